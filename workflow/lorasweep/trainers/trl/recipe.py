"""Make a complete recipe for TRL's `SFTTrainer` from a point's settings.

The section `trl` has the arguments of `trl.SFTConfig` by their names, among them each whose default there is another
than that of transformers' `TrainingArguments`. The section `lora` has those of `peft.LoraConfig`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.architecture import get_architecture
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.lora import find_modules
from lorasweep.experiment.sections import Controls, read_number
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE
from lorasweep.trainers import TrainingSpec
from lorasweep.trainers.sections import (
    describe_best_epoch,
    describe_samples,
    describe_tokenizer,
    dump_recipe,
    get_references,
)
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError

OPTIMIZERS = {
    "adamw": "adamw_torch_fused",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
}
"""Transformers' name of each `controls.optimizer`."""

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Transformers' name of each `controls.schedule`."""

_POSITION_TABLES = ("wpe.weight", "embed_positions.weight", "positions_embed.weight")
"""The ends of names of learnt positions."""

_WITH_TABLE = ("codegen", "ctrl", "gptj", "mpt")
"""Types of models whose code computes a table of positions, which is no tensor on disk."""

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""The keys of configurations that have the number of positions."""

_INITIAL = "initial_adapter"
"""Key of the override that names the adapter to begin with."""

_OWNED = {
    "output_dir": "experiment.name",
    "num_train_epochs": "controls.epochs",
    "per_device_train_batch_size": "controls.batch_size",
    "gradient_accumulation_steps": "controls.gradient_accumulation_steps",
    "learning_rate": "controls.lr",
    "weight_decay": "controls.weight_decay",
    "optim": "controls.optimizer",
    "lr_scheduler_type": "controls.schedule",
    "warmup_steps": "controls.num_warmup_steps or warmup_ratio",
    "max_grad_norm": "controls.clip_grad_norm",
    "seed": "controls.seed",
    "torch_compile": "controls.compile",
    "gradient_checkpointing": "controls.enable_activation_checkpointing",
    "max_length": "controls.max_seq_len",
    "packing": "controls.packed",
    # trl would give these to samples that it tokenizes itself.
    "chat_template_path": "model.chat_template",
    "eos_token": "the chat template, or the model's tokenizer",
    "dataset_text_field": "data.text_column",
    "truncation_mode": "data.too_long",
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "data.train_on_input"),
    **dict.fromkeys(("shuffle_dataset", "eval_packing", "packing_strategy", "dataset_num_proc"), "the workflow"),
    "use_cpu": "model.device",
    **dict.fromkeys(("bf16", "fp16"), "model.dtype"),
    **dict.fromkeys(("report_to", "save_strategy", "save_steps"), "training.metric_loggers and training.save_minutes"),
    **dict.fromkeys(("max_steps", "eval_strategy", "dataloader_drop_last", "dataset_kwargs"), "the workflow"),
}
"""Keys of the section `trl` that are not for the override, and what sets each."""


def recipe(spec: TrainingSpec) -> str:
    """Return the recipe as YAML.

    Raises:
        InputError: the model cannot be trained with these settings, or the override contradicts them.
    """
    _check(spec)
    controls, override = spec.controls, dict(spec.controls.override)
    initial = override.pop(_INITIAL, None)
    arguments = _describe_arguments(spec)
    _check_override(override, arguments)
    made = {
        "output_dir": f"{spec.output_dir}/{STATE}/train",
        "model": {
            "path": str(spec.checkpoint.path),
            "dtype": spec.model.dtype,
            "device": spec.model.device,
            **({"quantize": spec.model.quantize} if spec.model.quantize else {}),
        },
        **({"processes": controls.gpus} if controls.gpus > 1 else {}),
        "tokenizer": describe_tokenizer(spec),
        "dataset": describe_samples(spec.data, "train"),
        **({"dataset_val": describe_samples(spec.data, "validation")} if spec.data.validation else {}),
        "lora": _describe_lora(controls),
        **({"loraplus_lr_ratio": controls.loraplus_lr_ratio} if controls.loraplus_lr_ratio else {}),
        **({_INITIAL: _describe_initial(initial)} if initial is not None else {}),
        "max_steps_per_epoch": controls.max_steps_per_epoch,
        **describe_best_epoch(spec),
        "trl": _merge(controls, arguments, override),
    }
    return f"# base model fingerprint: {spec.checkpoint.fingerprint}\n" + dump_recipe(made)


def count_positions(checkpoint: Checkpoint, controls: Controls) -> int | None:
    """Return the most tokens of a sequence, for models that have a table of positions; `None` for others."""
    config = checkpoint.config
    if config.get("model_type") in _WITH_TABLE or any(name.endswith(_POSITION_TABLES) for name in checkpoint.tensors):
        return next((config[key] for key in _POSITIONS if config.get(key)), None)
    return None


def declared_adapter_only(override: Mapping[str, Any]) -> bool | None:
    """Return `None`: no key of an override says what is saved."""
    return None


def _check(spec: TrainingSpec) -> None:
    """Refuse settings that cannot be trained with, and modules that the model does not have."""
    controls, model = spec.controls, spec.model
    if model.dtype == "fp16":
        raise InputError("model.dtype: 'fp16' is invalid: trl does not train in fp16 here", "bf16 or fp32")
    if controls.packed:
        raise InputError("controls.packed: true is invalid with trainer: trl", "false, or trainer: torchtune")
    if controls.apply_lora_to_output:
        raise InputError(
            "controls.apply_lora_to_output: true is invalid with trainer: trl, which computes the loss by the head's "
            "weights alone",
            "false; or modules_to_save with the head's name, such as [lm_head], to train it as a whole",
        )
    modules = find_modules(spec.checkpoint, controls)
    if controls.loraplus_lr_ratio:
        for module in modules:
            if module in get_architecture(spec.checkpoint).embeddings:  # for which PEFT takes a fixed learning rate
                raise InputError(
                    f"controls.loraplus_lr_ratio: {controls.loraplus_lr_ratio} is invalid with an adapter on the "
                    f"embedding {module} (controls.lora_modules): LoRA+ has no learning rate for embeddings",
                    "loraplus_lr_ratio: null; or lora_modules without embeddings",
                )
    if controls.warmup_ratio is not None and controls.num_warmup_steps:
        raise InputError(
            f"controls.warmup_ratio: {controls.warmup_ratio} is invalid beside num_warmup_steps: "
            f"{controls.num_warmup_steps}",
            "one of the two",
        )
    if controls.changes_base:
        for key, value in (("model.quantize", model.quantize), ("controls.use_dora", controls.use_dora)):
            if value:
                raise InputError(
                    f"controls.init_lora_weights: {controls.init_lora_weights!r} is invalid with {key}: {value}: it "
                    "changes the base weights in training",
                    "kaiming or gaussian",
                )


def _check_override(override: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    for key, value in override.items():
        if key in _OWNED and not (key in arguments and arguments[key] == value):
            raise InputError(f"controls._override.{key}: {value!r} is invalid: this is set by {_OWNED[key]}")
        if key in Controls.model_fields and key not in _OWNED:
            raise InputError(f"controls._override.{key}: trl has no such argument", f"controls.{key}")


def _merge(controls: Controls, arguments: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge the override over the arguments, and resolve `${...}` from these and the controls."""
    merged: dict[str, Any] = arguments | _read_numbers(override)
    if "${" not in json.dumps(override):
        return merged
    # The environment of the training lacks it.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(get_references(controls) | merged), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(
            f"controls._override.{error.full_key}: {str(error).splitlines()[0]}",
            "${...} of a key of the recipe's section trl or of controls",
        ) from error
    return {key: resolved[key] for key in merged}


def _read_numbers(value: Any) -> Any:
    """Return a value with its numbers as such, as torchtune reads its recipes: YAML 1.1 has text in `1e-8`."""
    if isinstance(value, dict):
        return {key: _read_numbers(item) for key, item in value.items()}
    return [_read_numbers(item) for item in value] if isinstance(value, list) else read_number(value)


def _describe_lora(controls: Controls) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig`."""
    modules: Any = controls.llama_modules if controls.lora_modules is None else controls.lora_modules
    weights: Any = {"kaiming": True}.get(controls.init_lora_weights, controls.init_lora_weights)
    return {
        "r": controls.lora_rank,
        "lora_alpha": controls.alpha,
        "lora_dropout": controls.lora_dropout,
        # As a pattern of whole names, PEFT takes a text.
        "target_modules": modules["regex"] if isinstance(modules, dict) else modules,
        "modules_to_save": list(controls.modules_to_save) or None,
        "bias": "none",
        "use_rslora": controls.use_rslora,
        "use_dora": controls.use_dora,
        "init_lora_weights": weights,
    }


def _describe_initial(folder: Any) -> dict[str, str]:
    """Return the adapter that a training begins with, and the digest of its weights."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not isinstance(folder, str) or not Path(folder, name).is_file():
            raise InputError(f"controls._override.{_INITIAL}: no {name} in {folder!r}", "the folder of a LoRA adapter")
    return {"path": folder, "sha256": digest_file(Path(folder, ADAPTER_WEIGHTS))}


def _describe_arguments(spec: TrainingSpec) -> dict[str, Any]:
    """Return the arguments of `trl.SFTConfig`."""
    controls = spec.controls
    return {
        "num_train_epochs": controls.epochs,
        "per_device_train_batch_size": controls.batch_size,
        "gradient_accumulation_steps": controls.gradient_accumulation_steps,
        "learning_rate": controls.lr,
        "weight_decay": controls.weight_decay,
        "optim": OPTIMIZERS[controls.optimizer],
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": SCHEDULES[controls.schedule],
        # A fraction is of all steps.
        "warmup_steps": controls.num_warmup_steps if controls.warmup_ratio is None else controls.warmup_ratio,
        "max_grad_norm": controls.clip_grad_norm or 0.0,  # 0: no clipping
        "seed": controls.seed,
        "torch_compile": controls.compile,
        "gradient_checkpointing": controls.enable_activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_cpu": spec.model.device == "cpu",
        # No autocast: the adapter is in fp32, and the base model in its dtype, as modules_to_save on it are.
        "bf16": False,
        "fp16": False,
        # Samples are tokenized, cut and labelled already.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "pad_to_multiple_of": None,
        "max_length": None,
        "packing": False,
        "padding_free": False,
        "shuffle_dataset": False,
        "completion_only_loss": False,
        "assistant_only_loss": False,
        "loss_type": "nll",
        "router_aux_loss_coef": 0.0,
        "activation_offloading": False,
        "average_tokens_across_devices": True,
        "use_liger_kernel": False,
        "dataloader_drop_last": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
