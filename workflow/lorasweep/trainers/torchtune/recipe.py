"""Make a complete torchtune recipe from a point's settings, and check overrides against the experiment."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.experiment.sections import Controls, Data, DataKey, read_number
from lorasweep.layout import STATE
from lorasweep.trainers import TrainingSpec
from lorasweep.trainers.sections import (
    describe_best_epoch,
    describe_samples,
    describe_tokenizer,
    dump_recipe,
    get_references,
)
from lorasweep.trainers.torchtune.models import get_lora_arguments, get_model
from lorasweep.util.errors import InputError

PROCESSES = "nproc_per_node"
"""The recipe's key for `controls.gpus` if that is more than one. `tune run` has an option of this name."""

# Path of each control in the recipe, if it differs from the control's name.
_PLACES = {
    **{key: f"model.{key}" for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_attn_modules")},
    **{key: f"model.{key}" for key in ("apply_lora_to_mlp", "apply_lora_to_output")},
    **{key: f"optimizer.{key}" for key in ("lr", "weight_decay")},
    "num_warmup_steps": "lr_scheduler.num_warmup_steps",
    "max_seq_len": "tokenizer.max_seq_len",
    "gpus": PROCESSES,
    "packed": "dataset.packed",
}

# Keys that the workflow sets, and what sets each: a key of the experiment file, or the workflow for a reason.
_OWNED = {
    "output_dir": "experiment.name",
    PROCESSES: "controls.gpus",
    "resume_from_checkpoint": "the workflow, which resumes interrupted trainings from its own saved states",
    "checkpointer._component_": "the workflow, to torchtune.training.FullModelHFCheckpointer",
    "checkpointer.checkpoint_dir": "model.path",
    "checkpointer.checkpoint_files": "model.path",
    "checkpointer.output_dir": "experiment.name",
    "checkpointer.adapter_checkpoint": "the workflow, since every point starts from the base model",
    "checkpointer.recipe_checkpoint": "the workflow, since every point starts from the base model",
    "tokenizer._component_": "model.path",
    "tokenizer.path": "model.path",
    "tokenizer.chat_template": "model.chat_template",
    "tokenizer.prompt_template": "data.prompt",
    "tokenizer.template_date": "data.template_date",
    "metric_logger.log_dir": "experiment.name",
    "model.use_dora": "the workflow, since adapters are plain LoRA",
    "model.quantize_base": "the workflow, since the base model is not quantized",
    "dataset.data_files": "data.train",
    "dataset.max_samples": "data.max_samples",
    "dataset_val.data_files": "data.validation",
    **{
        f"{section}.{name}": key
        for section in ("dataset", "dataset_val")
        for name, key in {
            "format": "data.format",
            "column_map": "data.format and the columns under data",
            "new_system_prompt": "data.system_prompt",
            "too_long": "data.too_long",
            "train_on_input": "data.train_on_input",
        }.items()
    },
    "dtype": "model.dtype",
    "device": "model.device",
    "best_epoch": "evaluation.epochs",
    "patience": "controls.patience",
}

# Values that are accepted although the workflow sets these keys: they ask for what the workflow does anyway.
_ACCEPTED = {
    "checkpointer.checkpoint_dir": ("${output_dir}/checkpoints",),
    "checkpointer.output_dir": ("${output_dir}", "${output_dir}/hf_model", "${output_dir}/adapter"),
    "resume_from_checkpoint": (False,),
    "checkpointer.adapter_checkpoint": (None,),
    "checkpointer.recipe_checkpoint": (None,),
    "model.use_dora": (False,),
    "model.quantize_base": (False,),
}

_TRL = (
    *("optimizer", "schedule", "warmup_ratio", "use_rslora", "use_dora", "loraplus_lr_ratio", "init_lora_weights"),
    *("lora_modules", "modules_to_save"),
)
"""Controls that are for the trainer `trl` alone."""

_ADAPTER_ONLY = "save_adapter_weights_only"


def recipe(spec: TrainingSpec) -> str:
    """Return the recipe as YAML, in the key order of torchtune's recipes, with all interpolations resolved.

    Raises:
        InputError: torchtune cannot train this model with these settings, or the override contradicts them.
    """
    if spec.model.dtype == "fp16":
        raise InputError(
            "model.dtype: 'fp16' is invalid: torchtune does not train in fp16",
            "bf16 or fp32; or only runs with an adapter of their own, and baselines",
        )
    _refuse_what_is_trls(spec)
    override = _strip_override(spec)
    model, model_type = _get_model(spec, override)
    made = _make_recipe(spec, model, model_type)
    _refuse_references(spec, made)
    merged = _merge(spec, made, override)
    _refuse_references(spec, merged)
    if merged["dataset"].get("packed") and not merged["tokenizer"].get("max_seq_len"):
        raise InputError("controls.packed: true is invalid without max_seq_len", "a number of tokens")
    most, length = count_positions(spec.checkpoint, spec.controls), merged["tokenizer"].get("max_seq_len")
    if merged["dataset"].get("packed") and most and length > most:
        raise InputError(
            f"controls.max_seq_len: {length} is invalid with packed: true: the model takes {most} tokens",
            f"at most {most}",
        )
    name = "lora_finetune_single_device"
    if spec.controls.gpus > 1:
        name = f"--{PROCESSES} {spec.controls.gpus} lora_finetune_distributed"
    head = (
        f"# tune run {name} --config {spec.output_dir}/recipe.yaml\n"
        f"# base model fingerprint: {spec.checkpoint.fingerprint}\n"
    )
    return head + dump_recipe(merged)


def _refuse_what_is_trls(spec: TrainingSpec) -> None:
    """Refuse settings that torchtune's recipes have no equivalent for."""
    defaults = Controls()
    given = {f"controls.{key}": getattr(spec.controls, key) for key in _TRL if _differs(spec.controls, defaults, key)}
    given |= {"model.quantize": spec.model.quantize} if spec.model.quantize else {}
    for key, value in given.items():
        raise InputError(f"{key}: {value!r} is invalid with trainer: torchtune", f"trainer: trl, or no {key}")


def _refuse_references(spec: TrainingSpec, section: Mapping[str, Any], place: str = "") -> None:
    """Refuse text with `${`, which torchtune reads as a reference to a key of the recipe."""
    for name, value in section.items():
        path = f"{place}{name}"
        if isinstance(value, dict):
            _refuse_references(spec, value, f"{path}.")
            continue
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and "${" in text:
                owners = (key for owned, key in _OWNED.items() if f"{path}.".startswith(f"{owned}."))
                key = next(owners, f"controls._override.{path}")
                shown = spec.model.chat_template if path == "tokenizer.chat_template" else text
                raise InputError(
                    f"{key}: {shown!r} has '${{', which torchtune's recipes would replace",
                    "a text without '${', or trainer: trl",
                )


def _differs(controls: Controls, defaults: Controls, key: str) -> bool:
    return bool(getattr(controls, key) != getattr(defaults, key))


def count_positions(checkpoint: Checkpoint, controls: Controls) -> int | None:
    """Return the most tokens of a sequence that the model takes; `None` if a builder of the user's decides that."""
    override = controls.override.get("model")
    model = override if isinstance(override, Mapping) else {}
    if "_component_" in model:
        return None
    most = model.get("max_seq_len", checkpoint.config.get("max_position_embeddings"))
    return most if isinstance(most, int) else None


def declared_adapter_only(override: Mapping[str, Any]) -> bool | None:
    """Return an override's `save_adapter_weights_only`, which may also be under `checkpointer`; `None` if not set.

    Raises:
        InputError: the value is neither true nor false, or the two places differ.
    """
    checkpointer = override.get("checkpointer")
    places = {
        "_override": override,
        "_override.checkpointer": checkpointer if isinstance(checkpointer, Mapping) else {},
    }
    values: dict[str, Any] = {place: keys[_ADAPTER_ONLY] for place, keys in places.items() if _ADAPTER_ONLY in keys}
    for place, value in values.items():
        if not isinstance(value, bool):
            raise InputError(f"controls.{place}.{_ADAPTER_ONLY}: {value!r} is invalid", "true or false")
    if len(set(values.values())) > 1:
        raise InputError(f"controls._override: {_ADAPTER_ONLY} is both true and false", "one of them")
    return next(iter(values.values()), None)


def _make_recipe(spec: TrainingSpec, model: dict[str, Any], model_type: str) -> dict[str, Any]:
    controls = spec.controls
    state = f"{spec.output_dir}/{STATE}/train"
    return {
        "output_dir": state,
        **({PROCESSES: controls.gpus} if controls.gpus > 1 else {}),
        "model": model,
        "tokenizer": {
            "_component_": "lorasweep.trainers.torchtune.tokenizer.ChatTokenizer",
            **describe_tokenizer(spec),
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(spec.checkpoint.path),
            "checkpoint_files": list(spec.checkpoint.shards),
            "recipe_checkpoint": None,
            "output_dir": state,
            "model_type": model_type,
        },
        "resume_from_checkpoint": False,
        _ADAPTER_ONLY: True,
        "dataset": _make_dataset(spec.data, "train", controls.packed),
        **_make_validation(spec.data),
        "seed": controls.seed,
        "shuffle": True,
        "batch_size": controls.batch_size,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": controls.weight_decay,
            "lr": controls.lr,
        },
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": controls.num_warmup_steps,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": controls.epochs,
        **describe_best_epoch(spec),
        "max_steps_per_epoch": controls.max_steps_per_epoch,
        "gradient_accumulation_steps": controls.gradient_accumulation_steps,
        "clip_grad_norm": controls.clip_grad_norm,
        "compile": controls.compile,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": f"{state}/logs",
        },
        "log_every_n_steps": 1,
        "log_peak_memory_stats": True,
        "device": spec.model.device,
        "dtype": spec.model.dtype,
        "enable_activation_checkpointing": controls.enable_activation_checkpointing,
        "enable_activation_offloading": False,
        "profiler": {"_component_": "torchtune.training.setup_torch_profiler", "enabled": False},
    }


def _make_validation(data: Data) -> dict[str, Any]:
    """Return the section `dataset_val`. torchtune's LoRA recipes ignore it; the workflow's loop reads it."""
    return {"dataset_val": _make_dataset(data, "validation", packed=False)} if data.validation else {}


def _make_dataset(data: Data, key: DataKey, packed: bool) -> dict[str, Any]:
    component = "lorasweep.trainers.torchtune.dataset.training_data"
    return {"_component_": component, **describe_samples(data, key), "packed": packed}


def _strip_override(spec: TrainingSpec) -> dict[str, Any]:
    """Return the override without the keys that the workflow sets.

    Raises:
        InputError: the override changes a key that the workflow sets, or has a control at the wrong path.
    """
    try:
        override: Any = _sort_keys(OmegaConf.to_container(OmegaConf.create(spec.controls.override)))
    except OmegaConfBaseException as error:
        raise InputError(f"controls._override: {str(error).splitlines()[0]}") from error
    spec_values: dict[str, Any] = {
        "checkpointer._component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpointer.checkpoint_dir": str(spec.checkpoint.path),
        "tokenizer.prompt_template": spec.data.prompt,
        "dataset.new_system_prompt": spec.data.system_prompt,
        "dataset_val.new_system_prompt": spec.data.system_prompt,
        "dtype": spec.model.dtype,
        "device": spec.model.device,
    }
    mappings = ("model", "tokenizer", "checkpointer", "dataset", "dataset_val", "optimizer", "lr_scheduler")
    for section in (*mappings, "metric_logger"):
        if section in override and not isinstance(override[section], dict):
            raise InputError(
                f"controls._override.{section}: {override[section]!r} is invalid",
                f"a mapping, merged into the recipe's '{section}'",
            )
    override.pop(_ADAPTER_ONLY, None)
    override.get("checkpointer", {}).pop(_ADAPTER_ONLY, None)
    for path, key in _OWNED.items():
        *sections, last = path.split(".")
        keys = override.get(sections[0], {}) if sections else override
        # Another component of a section may not take what the workflow gives its own; the data are checked by digest.
        is_left_out = "_component_" in keys and keys.get(last, "") is None and last != "data_files"
        if last not in keys or is_left_out:
            continue
        value = keys.pop(last)
        if value not in (*_ACCEPTED.get(path, ()), *([spec_values[path]] if path in spec_values else [])):
            raise InputError(f"controls._override.{path}: {value!r} is invalid: this is set by {key}")
    for key, path in _PLACES.items():
        if key in override:
            raise InputError(
                f"controls._override.{key}: torchtune's recipe has no such key",
                f"controls.{key}, or controls._override.{path}",
            )
    return dict(override)


def _sort_keys(value: Any) -> Any:
    """Return a value with all mappings sorted by key, so that the order in the file does not change the recipe."""
    if isinstance(value, dict):
        return {key: _sort_keys(value[key]) for key in sorted(value, key=str)}
    return [_sort_keys(item) for item in value] if isinstance(value, list) else value


def _get_model(spec: TrainingSpec, override: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the model section and the model type; for a user's builder, only its name and the LoRA arguments."""
    model_type = override.get("checkpointer", {}).get("model_type")
    if "_component_" not in override.get("model", {}):
        derived, derived_type = get_model(spec.checkpoint, spec.controls)
        return derived, model_type or derived_type
    model = {"_component_": override["model"]["_component_"], **get_lora_arguments(spec.controls)}
    return model, model_type or _get_model_type(spec.checkpoint, spec.controls)


def _get_model_type(checkpoint: Checkpoint, controls: Controls) -> str:
    try:
        return get_model(checkpoint, controls)[1]
    except InputError as error:
        raise InputError(
            "controls._override.checkpointer.model_type is missing",
            f"a name of torchtune.training.ModelType, which selects the conversion of the weights; {error}",
        ) from error


def _merge(spec: TrainingSpec, made: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge the override over the recipe, and resolve `${...}` from the recipe and the controls.

    `null` removes a key of a section, so that the section's component gets its own default. A key outside of sections
    stays, as torchtune reads it: there, `null` is a value.
    """
    variables = {key: value for key, value in get_references(spec.controls).items() if key not in made}
    merged: Any = made
    if override:
        try:
            merged = OmegaConf.to_container(OmegaConf.merge(variables, made, override), resolve=True)
        except OmegaConfBaseException as error:
            raise InputError(
                f"controls._override.{error.full_key}: {str(error).splitlines()[0]}",
                "${...} of a key of the recipe or of controls",
            ) from error
    merged = {key: value for key, value in merged.items() if key not in variables}
    for key, section in override.items():
        if isinstance(section, dict):
            _remove_nulls(merged[key], section)
    if override:
        _refuse_controls(spec, made, merged, override)
    return dict(merged)


def _refuse_controls(
    spec: TrainingSpec, made: dict[str, Any], merged: dict[str, Any], override: dict[str, Any]
) -> None:
    """Refuse an override of what a control sets: names, checks, the plan and the table go by the control's value."""
    for key in Controls.model_fields:
        path = _PLACES.get(key, key)
        section = path.partition(".")[0]
        value, own = _select(merged, path), _select(made, path)
        # Another component may not take what its section gives; a builder of a model, what is off.
        is_other = section != path and "_component_" in override.get(section, {})
        is_left_out = value is None and is_other and not (section == "model" and own)
        if key in ("override", *_TRL) or read_number(value) == own or (is_left_out and key not in spec.swept):
            continue
        if key in spec.swept:
            raise InputError(
                f"controls._override.{path}: {value!r} contradicts the variable '{key}', which is {own!r} here",
                f"no {path} in the override, or ${{{key}}}",
            )
        raise InputError(
            f"controls._override.{path}: {value!r} is invalid: this is set by controls.{key}, which is {own!r}",
            f"no {path} in the override" + ("" if value is None else f", and controls.{key}: {value}"),
        )


def _remove_nulls(merged: dict[str, Any], section: dict[str, Any]) -> None:
    """Remove the keys from a merged section that are `null` in the override's section."""
    for key, value in section.items():
        if value is None:
            del merged[key]
        elif isinstance(value, dict):
            _remove_nulls(merged[key], value)


def _select(recipe: dict[str, Any], path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key)
    return value
