"""torchtune 0.6.1: its recipe `lora_finetune_single_device` is made of a point's settings, and run; for several GPUs
`lora_finetune_distributed`.

Adapters alone are trained and saved, whatever the mode: torchtune's own full export adds the update into the live
weights, which on a CPU corrupts the model from the second epoch on.
"""

import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorasweep.attempt import Attempt, explain_memory_kill, read_attempt
from lorasweep.checkpoint import Checkpoint, read_checkpoint
from lorasweep.digest import digest_file
from lorasweep.errors import InputError
from lorasweep.experiment import Controls, Data
from lorasweep.files import explain_write_failure, hold_alone, write_aside
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD, STATE, TRAINING_LOG
from lorasweep.trainers import SAVE_MINUTES, Diverged, Killed, TrainingError, TrainingSpec
from lorasweep.trainers.publication import check_weights, complete, publish
from lorasweep.trainers.torchtune_models import get_lora_arguments, get_model
from lorasweep.versions import get_versions

STAGE = "train"

PROCESSES = "nproc_per_node"
"""The recipe's key for `controls.gpus`, where that is more than one; `tune run` calls it so."""

# Where each control stands in the recipe.
_PLACES = {
    **{key: f"model.{key}" for key in ("lora_rank", "lora_alpha", "lora_dropout", "lora_attn_modules")},
    **{key: f"model.{key}" for key in ("apply_lora_to_mlp", "apply_lora_to_output")},
    **{key: f"optimizer.{key}" for key in ("lr", "weight_decay")},
    "num_warmup_steps": "lr_scheduler.num_warmup_steps",
    "max_seq_len": "tokenizer.max_seq_len",
    "gpus": PROCESSES,
    "packed": "dataset.packed",
}

# What the workflow itself decides, and where the experiment file says it.
_OWNED = {
    "output_dir": "experiment.name",
    PROCESSES: "controls.gpus",
    "resume_from_checkpoint": "nothing: a training that was interrupted goes on from a state of our own",
    "checkpointer._component_": "torchtune.training.FullModelHFCheckpointer",
    "checkpointer.checkpoint_dir": "model.path",
    "checkpointer.checkpoint_files": "model.path",
    "checkpointer.output_dir": "experiment.name",
    "checkpointer.adapter_checkpoint": "nothing: every point starts at the base model",
    "checkpointer.recipe_checkpoint": "nothing: every point starts at the base model",
    "tokenizer._component_": "model.path",
    "tokenizer.path": "model.path",
    "tokenizer.prompt_template": "data.prompt",
    "dataset.new_system_prompt": "data.system_prompt",
    "metric_logger.log_dir": "experiment.name",
    "model.use_dora": "nothing: adapters are plain LoRA",
    "model.quantize_base": "nothing: the base model is trained on as it is",
    "dataset.source": "data.train",
    "dataset.data_files": "data.train",
    "dataset_val.new_system_prompt": "data.system_prompt",
    "dataset_val.source": "data.validation",
    "dataset_val.data_files": "data.validation",
    "dtype": "model.dtype",
    "device": "model.device",
}

# Values that say what the workflow does in its own way: the full model and the adapter have folders of their own.
_SAID_ANYWAY = {
    "checkpointer.checkpoint_dir": ("${output_dir}/checkpoints",),
    "checkpointer.output_dir": ("${output_dir}", "${output_dir}/hf_model", "${output_dir}/adapter"),
    "resume_from_checkpoint": (False,),
    "model.use_dora": (False,),
    "model.quantize_base": (False,),
}

_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets")
"""Those that the numbers of a training depend on."""

_OUT_OF_MEMORY = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory"
_MEMORY_NOTE = "train.memory.json"
_MOST_HALVINGS = 3
_ATTEMPT = "train.attempt.json"
_DIVERGENCE_NOTE = "train.diverged.json"

_ADAPTER_ONLY = "save_adapter_weights_only"


def recipe(spec: TrainingSpec) -> str:
    """Return the recipe as YAML, in the order of torchtune's own, every interpolation resolved.

    Raises:
        InputError: torchtune cannot train this model with these settings, or the override contradicts them.
    """
    override = _strip_override(spec)
    model, model_type = _get_model(spec, override)
    made = _make_recipe(spec, model, model_type)
    merged = _merge(spec, made, override)
    if merged["dataset"].get("packed") and not merged["tokenizer"].get("max_seq_len"):
        raise InputError("controls.packed: true is not accepted without max_seq_len; accepted: a number of tokens")
    name = "lora_finetune_single_device"
    if spec.controls.gpus > 1:
        name = f"--{PROCESSES} {spec.controls.gpus} lora_finetune_distributed"
    head = (
        f"# tune run {name} --config {spec.output_dir}/recipe.yaml\n"
        f"# base model fingerprint: {spec.checkpoint.fingerprint}\n"
    )
    return head + dump_recipe(merged)


def dump_recipe(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as PyYAML's own dumper writes it: a recipe that reads otherwise is trained anew.

    libyaml's is ten times as fast, and differs for a line separator and for characters over U+FFFF, which it escapes.
    """
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    text = str(yaml.dump(dict(recipe), Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **style))
    return str(yaml.safe_dump(dict(recipe), **style)) if re.search(r"\\[UN]", text) else text


def declared_adapter_only(override: Mapping[str, Any]) -> bool | None:
    """Return what an override says on `save_adapter_weights_only`, which is often put under `checkpointer`.

    Raises:
        InputError: it is neither true nor false, or said twice and differently.
    """
    checkpointer = override.get("checkpointer")
    places = {
        "_override": override,
        "_override.checkpointer": checkpointer if isinstance(checkpointer, Mapping) else {},
    }
    said: dict[str, Any] = {place: keys[_ADAPTER_ONLY] for place, keys in places.items() if _ADAPTER_ONLY in keys}
    for place, value in said.items():
        if not isinstance(value, bool):
            raise InputError(f"controls.{place}.{_ADAPTER_ONLY}: {value!r} is not accepted; accepted: true or false")
    if len(set(said.values())) > 1:
        raise InputError(f"controls._override: {_ADAPTER_ONLY} is both true and false; accepted: one of them")
    return next(iter(said.values()), None)


def measure_lengths(recipe: Path, most: int) -> list[int]:
    """Return how many tokens samples have, of so many at most, evenly taken; none is cut or packed."""
    from datasets.utils import disable_progress_bars
    from torchtune import config as components

    disable_progress_bars()
    config = OmegaConf.load(recipe)
    config.tokenizer.max_seq_len = None
    config.dataset.packed = False
    with tempfile.TemporaryDirectory() as cache:  # and not in the home
        dataset = components.instantiate(config.dataset, components.instantiate(config.tokenizer), cache_dir=cache)
        step = max(1, -(-len(dataset) // most))
        return [len(dataset[index]["tokens"]) for index in range(0, len(dataset), step)]


def train(
    recipe: Path,
    adapter: Path,
    metric_loggers: Collection[str] = (),
    save_minutes: float = SAVE_MINUTES,
    earlier: Mapping[int, Path] | None = None,
) -> None:
    """Run a recipe, and publish the adapter of its last epoch, and those of `earlier` ones, each in its directory.

    `adapter/` appears whole or not at all: the weights as safetensors, PEFT's configuration, the base model's
    tokenizer, the log of the training, and a record of what was trained on what. It has no
    `config.json`, with which transformers would take it for a full model.

    What was trained stays in the point's state too, until the point is cleaned up: a training that ended after the run
    that wanted it had died is not done again. One that was interrupted goes on from the last state that it saved, and
    ends bit for bit as if it had not been; a state of another recipe, base model or version is dropped.

    Raises:
        Diverged: a loss or a value of the update is not finite, now or when this very training was done before.
        Stopped: it was told to stop, and its state is saved.
        TrainingError: torchtune failed, the update is zero, or there is no such epoch.
    """
    config = OmegaConf.load(recipe)
    targets = {**(earlier or {}), config.epochs: adapter}
    if max(targets) > config.epochs:
        raise TrainingError(f"{recipe}: is of {config.epochs} epochs, and that of epoch {max(targets)} is wanted")
    state = Path(config.output_dir)
    trained = state.with_name("trained")
    with hold_alone(state.with_name("train.lock"), f"training {adapter.parent.name}"):
        if all(_is_trained(trained / str(epoch), recipe) for epoch in targets):
            print(f"This recipe was trained by an earlier run, which did not see its end: {trained} is taken.")
        else:
            shutil.rmtree(trained, ignore_errors=True)
            facts = {"data_sha256": _check_digest(recipe, Path(config.dataset.data_files))}
            with _note_divergence(recipe, config), _mark_attempt(recipe, config):
                facts |= _run(recipe, config, adapter.parent, metric_loggers, save_minutes)
                _collect(recipe, config, state / "trained", targets, facts).rename(trained)
            shutil.rmtree(state)
            for note in (_MEMORY_NOTE, _DIVERGENCE_NOTE):
                state.with_name(note).unlink(missing_ok=True)
        for epoch, target in targets.items():
            publish(trained / str(epoch), target)


@contextmanager
def _note_divergence(recipe: Path, config: Any) -> Iterator[None]:
    """Do not do again what diverged: with the same recipe, model and versions it would come to the same."""
    note = Path(config.output_dir).with_name(_DIVERGENCE_NOTE)
    said = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    key = _get_key(recipe, config)
    if said.get("key") == key:
        raise Diverged(f"{said['message']} (in an earlier attempt; to try again, remove {note})")
    try:
        yield
    except Diverged as error:
        write_aside(note, json.dumps({"key": key, "message": str(error)}) + "\n")
        raise


@contextmanager
def _mark_attempt(recipe: Path, config: Any) -> Iterator[None]:
    """Leave a mark while a recipe is run; where one is found, take smaller batches if that attempt lacked memory."""
    mark = Path(config.output_dir).with_name(_ATTEMPT)
    before, now = read_attempt(mark), Attempt.of_this_process(digest_file(recipe))
    if before and before.recipe_sha256 == now.recipe_sha256 and (why := explain_memory_kill(before, now)):
        print(f"An earlier attempt was killed for its memory: {why}", flush=True)
        # On a GPU a batch lies in the GPU's memory; of the machine's, a retry asks for more.
        if config.device == "cpu":
            _plan_halving(recipe, config, _read_halvings(recipe, config))
    now.write(mark)
    try:
        yield
    except Killed:  # it could not say why, as if all of it had been killed
        raise
    except BaseException:
        mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def _is_trained(adapter: Path, recipe: Path) -> bool:
    record = adapter / RECORD
    if not record.is_file():
        return False
    said = json.loads(record.read_text(encoding="utf-8"))
    digests = (digest_file(recipe), digest_file(adapter / ADAPTER_WEIGHTS))
    return (said["recipe_sha256"], said["adapter_sha256"]) == digests


def _check_digest(recipe: Path, data: Path) -> str:
    """Return the digest of the training data, which is the one that the recipe names, where it names one."""
    found = digest_file(data)
    named = re.match(r"# training data sha256: (\w+)\n", recipe.read_text(encoding="utf-8"))
    if named and named[1] != found:
        raise TrainingError(
            f"{data}: has changed since {recipe} was written (sha256 {named[1][:12]}, now {found[:12]}); run again"
        )
    return found


def _run(
    recipe: Path, config: Any, point: Path, metric_loggers: Collection[str], save_minutes: float
) -> dict[str, Any]:
    """Run a recipe, and return what it measured beside its log."""
    folder = Path(config.output_dir)
    if config.device == "cpu":  # where torchtune sees a GPU, it packs samples for that
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The caches of `datasets` lie in the user's home by default, which on a cluster has a quota.
    cache = folder / "huggingface"
    os.environ |= {name: str(cache) for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")}
    from lorasweep.trainers import torchtune_processes, torchtune_recipe, torchtune_state

    saved = torchtune_state.SavedStates(folder / "saved", _get_key(recipe, config))
    state = saved.load()
    for leftover in (cache, folder / "trained") if state else (folder,):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    halvings = _read_halvings(recipe, config)
    given = config.copy()
    _halve_batch(config, halvings)
    settings: Any = OmegaConf.to_container(config)
    log, processes = folder / TRAINING_LOG, config.get(PROCESSES, 1)
    try:
        if processes > 1:
            peak = torchtune_processes.run(processes, config, log, point, metric_loggers, saved, save_minutes, halvings)
        else:
            loggers = torchtune_recipe.make_loggers(metric_loggers, point, folder, settings)
            peak = torchtune_recipe.run(config, log, loggers, saved, state, save_minutes, halvings)
    except TrainingError:
        raise
    except Exception as error:
        traceback.print_exc()
        if re.search(_OUT_OF_MEMORY, str(error)):
            first = re.split(r"[.] |\n", str(error))[0]
            raise TrainingError(f"{first}; {_plan_halving(recipe, given, halvings)}") from error
        why = explain_write_failure(folder) or f"{type(error).__name__}: {error}"
        raise TrainingError(f"torchtune failed; {why}") from error
    return {"peak_memory_bytes": peak, "batch_size_used": config.batch_size}


def _read_halvings(recipe: Path, config: Any) -> int:
    """Return how often a batch is to be halved, since memory was not enough."""
    note = Path(config.output_dir).with_name(_MEMORY_NOTE)
    said = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    halvings: int = said["halvings"] if said.get("recipe_sha256") == digest_file(recipe) else 0
    return halvings


def _halve_batch(config: Any, halvings: int) -> None:
    """Have a recipe take smaller batches, and more of them a step."""
    if halvings:
        config.batch_size //= 2**halvings
        config.gradient_accumulation_steps *= 2**halvings
        print(f"Memory was not enough before: batch_size is {config.batch_size} now", flush=True)


def _plan_halving(recipe: Path, config: Any, halvings: int) -> str:
    """Leave word that from now on half the batch is taken, and return what to say of it; `config` is as given."""
    batch_size = config.batch_size // 2**halvings
    tried = f"batch_size {batch_size} is too much"
    if halvings == _MOST_HALVINGS:
        return f"{tried}, after {halvings} halvings"
    if batch_size % 2:
        return f"{tried}, and has no half"
    note = {"recipe_sha256": digest_file(recipe), "halvings": halvings + 1}
    write_aside(Path(config.output_dir).with_name(_MEMORY_NOTE), json.dumps(note) + "\n")
    return f"{tried}: the next attempt takes half of it, and twice the gradient_accumulation_steps"


def _get_key(recipe: Path, config: Any) -> dict[str, Any]:
    """What a saved state must be of."""
    return {
        "recipe_sha256": digest_file(recipe),
        "base_model_fingerprint": read_checkpoint(Path(config.checkpointer.checkpoint_dir)).fingerprint,
        "versions": get_versions(*_PACKAGES),
    }


def _collect(recipe: Path, config: Any, folder: Path, epochs: Iterable[int], facts: Mapping[str, Any]) -> Path:
    """Put together in `folder`, by epoch, what is published, and return it."""
    base = read_checkpoint(Path(config.checkpointer.checkpoint_dir))
    facts = {"trainer": "torchtune", "dtype": config.dtype, **facts}
    folder.mkdir()
    for epoch in epochs:
        adapter, trained = folder / str(epoch), Path(config.checkpointer.output_dir) / f"epoch_{epoch - 1}"
        _check_weights(trained / ADAPTER_WEIGHTS)
        adapter.mkdir()
        # Files of torchtune's have mode 0600; copies have what the umask says.
        shutil.copyfile(trained / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
        peft_config = json.loads((trained / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path.resolve()),
        }
        (adapter / ADAPTER_CONFIG).write_text(
            json.dumps(peft_config, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        complete(adapter, base, recipe, Path(config.output_dir, TRAINING_LOG), epoch, _PACKAGES, facts)
    return folder


def _check_weights(weights: Path) -> None:
    from safetensors import SafetensorError

    try:
        check_weights(weights)
    except (OSError, SafetensorError) as error:
        # Of an attempt that went on after it: what it left can be trusted no more.
        shutil.rmtree(weights.parents[1])
        raise TrainingError(f"{weights}: cannot be read ({error}); the next attempt trains anew") from error


def _make_recipe(spec: TrainingSpec, model: dict[str, Any], model_type: str) -> dict[str, Any]:
    controls = spec.controls
    state = f"{spec.output_dir}/{STATE}/train"
    return {
        "output_dir": state,
        **({PROCESSES: controls.gpus} if controls.gpus > 1 else {}),
        "model": model,
        "tokenizer": {
            "_component_": "lorasweep.trainers.torchtune_data.ChatTokenizer",
            "path": str(spec.checkpoint.path),
            "max_seq_len": controls.max_seq_len,
            **({"prompt_template": spec.data.prompt} if spec.data.prompt else {}),
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
        "dataset": _make_dataset(spec.data, spec.data.train, _get_split(spec.data), packed=controls.packed),
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
    """The section that torchtune's recipes with a validation of their own have; this one reads over it."""
    return {"dataset_val": _make_dataset(data, data.validation, "train", packed=False)} if data.validation else {}


def _get_split(data: Data) -> str:
    return f"train[:{data.max_samples}]" if data.max_samples else "train"


def _make_dataset(data: Data, file: str | None, split: str, packed: bool) -> dict[str, Any]:
    if data.format == "completion":
        return {
            "_component_": "torchtune.datasets.text_completion_dataset",
            "column": data.text_column,
            "source": "json",
            "data_files": file,
            "split": split,
            "packed": packed,
        }
    shared = {
        "source": "json",
        "data_files": file,
        "split": split,
        "new_system_prompt": data.system_prompt,
        "train_on_input": data.train_on_input,
        "packed": packed,
    }
    if data.format == "instruct":
        columns = {"input": data.input_column, "output": data.output_column}
        return {"_component_": "torchtune.datasets.instruct_dataset", "column_map": columns, **shared}
    return {
        "_component_": "torchtune.datasets.chat_dataset",
        "conversation_column": data.messages_column,
        "conversation_style": "openai",
        **shared,
    }


def _strip_override(spec: TrainingSpec) -> dict[str, Any]:
    """Return the override less what the workflow does anyway.

    Raises:
        InputError: it sets what the workflow decides, or a control that torchtune knows by another path.
    """
    try:
        override: Any = _sort_keys(OmegaConf.to_container(OmegaConf.create(spec.controls.override)))
    except OmegaConfBaseException as error:
        raise InputError(f"controls._override: {str(error).splitlines()[0]}") from error
    said_by_spec = {
        "checkpointer._component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpointer.checkpoint_dir": str(spec.checkpoint.path),
        "dtype": spec.model.dtype,
        "device": spec.model.device,
    }
    mappings = ("model", "tokenizer", "checkpointer", "dataset", "dataset_val", "optimizer", "lr_scheduler")
    for section in (*mappings, "metric_logger"):
        if section in override and not isinstance(override[section], dict):
            raise InputError(
                f"controls._override.{section}: {override[section]!r} is not accepted; accepted: a mapping, merged "
                f"into the recipe's '{section}'"
            )
    override.pop(_ADAPTER_ONLY, None)
    override.get("checkpointer", {}).pop(_ADAPTER_ONLY, None)
    for path, key in _OWNED.items():
        *sections, last = path.split(".")
        keys = override.get(sections[0], {}) if sections else override
        if last not in keys:
            continue
        value = keys.pop(last)
        if value not in (*_SAID_ANYWAY.get(path, ()), said_by_spec.get(path)):
            raise InputError(f"controls._override.{path}: {value!r} is not accepted: this is said by {key}")
    for key, path in _PLACES.items():
        if key in override:
            raise InputError(
                f"controls._override.{key}: torchtune's recipe has no such key; accepted: controls.{key}, or "
                f"controls._override.{path}"
            )
    return dict(override)


def _sort_keys(value: Any) -> Any:
    """Mappings in the order of their keys: in which order a person wrote them makes no other recipe."""
    if isinstance(value, dict):
        return {key: _sort_keys(value[key]) for key in sorted(value, key=str)}
    return [_sort_keys(item) for item in value] if isinstance(value, list) else value


def _get_model(spec: TrainingSpec, override: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the model section and the checkpointer's model type; of an expert's builder, its LoRA arguments alone."""
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
            f"controls._override.checkpointer.model_type is missing; accepted: a name of torchtune.training.ModelType, "
            f"which says how weights are converted; {error}"
        ) from error


def _merge(spec: TrainingSpec, made: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Merge the override last, and resolve `${...}` by the recipe's keys and the controls'."""
    plain = {"gpus": spec.controls.gpus, **spec.controls.model_dump(exclude={"override"})}
    known = {key: value for key, value in plain.items() if key not in made} | get_lora_arguments(spec.controls)
    merged: Any = made
    if override:
        try:
            merged = OmegaConf.to_container(OmegaConf.merge(known, made, override), resolve=True)
        except OmegaConfBaseException as error:
            raise InputError(f"controls._override: {str(error).splitlines()[0]} (key: {error.full_key})") from error
    merged = {key: value for key, value in merged.items() if key not in known}
    for key in spec.swept:
        path = _PLACES.get(key, key)
        value, swept = _select(merged, path), _select(made, path)
        if value != swept:
            raise InputError(
                f"controls._override.{path}: {value!r} contradicts the variable '{key}', which is {swept!r} here; "
                f"accepted: {path} left out, or ${{{key}}}"
            )
    return dict(merged)


def _select(recipe: dict[str, Any], path: str) -> Any:
    value: Any = recipe
    for key in path.split("."):
        value = value.get(key)
    return value
