"""Read PEFT adapter directories, check them against their base model, and check that they were applied completely.

An adapter that is silently not applied gives the base model's results under the adapter's name. So every merge and
every evaluation reads the adapter here first. Every feature of a PEFT adapter is either supported here or refused by
name. Names and meanings follow PEFT's `LoraConfig` and `save_pretrained`
(https://huggingface.co/docs/peft/package_reference/lora).
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, inject_adapter_in_model

from lorasweep.adapters.architecture import find_targets, read_architecture
from lorasweep.adapters.identity import HARMLESS
from lorasweep.checkpoints.checkpoint import Checkpoint, Tensor, read_header
from lorasweep.checkpoints.tensors import DTYPES, read_tensor
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError

_PREFIX = "base_model.model."
_LORA_NAME = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)"
)
_COPY_NAME = re.compile(r"(?P<module>.+)\.(?P<copy>original_module|modules_to_save)\.(?P<kind>[^.]+)")
"""Name of a copy of a saved module. PEFT also saves two copies if the vocabulary was resized before the training."""

_UNDERSTOOD = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "use_dora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
    *("init_lora_weights", "ensure_weight_tying"),
}

_REFUSED = {
    "alora_invocation_tokens": "it is active only after certain tokens, which cannot be merged",
    "arrow_config": "it is routed token by token, which cannot be merged",
    "kasa_config": "it also changes the base model",
    "layer_replication": "it adds layers to the base model",
    "megatron_config": "it uses Megatron's layers",
    "monteclora_config": "it samples its weights",
    "target_parameters": "it changes parameters that are not weights of linear layers",
    "trainable_token_indices": "it changes individual rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal",
    "use_qalora": "it pools its inputs",
    "velora_config": "it depends on the state of its training",
}
"""Features of PEFT that are refused, each with the reason."""

_TYPES: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "modules_to_save": list,
    "rank_pattern": dict,
    "alpha_pattern": dict,
}
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
"""Keys that select modules of the base model."""

_NEEDED = ("r", "lora_alpha", "target_modules")

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterError(InputError):
    """An adapter cannot be applied to its base model, or was not applied."""


class ChangedBaseError(InputError):
    """The base model in memory is not the one in its files, so that no earlier result on it can be trusted."""


@dataclass(frozen=True)
class Update:
    """LoRA's update of one weight W of the base model: W + scale · (B·A), which DoRA also rescales."""

    a: str
    """Name of A. Its shape is [r, in], or [r, vocabulary] for an embedding."""
    b: str
    """Name of B. Its shape is [out, r], or [width, r] for an embedding."""
    scale: float
    """Factor of B·A: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    transposed: bool
    """Whether W has shape [in, out], as in embeddings and the layers of GPT-2, instead of [out, in]."""
    magnitude: str | None = None
    """Name of DoRA's magnitudes (Liu et al. 2024, arXiv:2402.09353), one per output; `None` without DoRA."""
    rounded_first: bool = False
    """Whether the update is rounded to the weight's precision before it is added, as PEFT does for embeddings."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, and the changes that it makes to its base model."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """Tensors by PEFT's name without its prefix, such as `<module>.lora_A.weight` and `<module>.lora_B.weight`."""
    updates: dict[str, Update] = field(default_factory=dict)
    """Updates by the name of the base model's parameter in memory (`Architecture`)."""
    biases: dict[str, tuple[str, float]] = field(default_factory=dict)
    """For each changed bias, by the name in memory, the tensor that is added to it and its scale (`lora_bias`)."""
    replaced: dict[str, str] = field(default_factory=dict)
    """For each replaced parameter, by the name in memory, the adapter's tensor (`bias`, `modules_to_save`)."""

    @cached_property
    def sha256(self) -> str:
        """sha256 of the weights file, in hexadecimal."""
        return digest_file(self.path / ADAPTER_WEIGHTS)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor by its name in `tensors`, in its stored precision."""
        return read_tensor(self.path, self.tensors[name])


def read_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter, and check that it can be applied to this base model.

    Raises:
        AdapterError: a file is missing or unreadable, a feature of PEFT is not supported, a value is not finite, the
            whole update is zero, tensors and configuration do not match, PEFT would not apply it, or the adapter
            belongs to another base model (by the fingerprint in its record, by names, or by shapes).
        InputError: the base model's configuration and files disagree.
    """
    config = _read_config(path)
    try:
        header = read_header(path / ADAPTER_WEIGHTS)
    except InputError as error:
        raise AdapterError(f"{path}: not a readable adapter: {error}") from error
    trained_on = _read_fingerprint(path / RECORD) or base.fingerprint
    if trained_on != base.fingerprint:
        raise AdapterError(
            f"{path}: the adapter was trained on another base model (fingerprint {trained_on[:12]}) than {base.path} "
            f"(fingerprint {base.fingerprint[:12]})"
        )
    ignored = sorted(name for name in header if not name.startswith(_PREFIX))
    if ignored:
        raise AdapterError(
            f"{path}: PEFT would ignore {len(ignored)} of {len(header)} tensors (first: '{ignored[0]}')",
            f"names that begin with '{_PREFIX}', as saved by PEFT",
        )
    adapter = Adapter(path, config, {name.removeprefix(_PREFIX): tensor for name, tensor in header.items()})
    if not adapter.tensors:
        raise AdapterError(f"{path}: the adapter has no tensors")
    with _refuse_errors(path):
        targets, replaced = find_targets(base, json.dumps({key: config.get(key) for key in _SELECTING}))
    modules = _sort_tensors(adapter, base, replaced)
    for module, parts in modules.items():
        _add_update(adapter, module, parts, base)
    _check_targets(adapter, modules.keys(), targets)
    _check_values(adapter, base)
    return adapter


@contextmanager
def _refuse_errors(path: Path) -> Iterator[None]:
    """Refuse an adapter's configuration if PEFT raises an error of any type."""
    file = path / ADAPTER_CONFIG
    try:
        yield
    except InputError:
        raise
    except re.error as error:
        raise AdapterError(f"{file}: {error.pattern!r} is not a regular expression: {error}") from error
    except Exception as error:
        raise AdapterError(
            f"{file}: PEFT cannot apply it: {type(error).__name__}: {error}", "values as written by PEFT"
        ) from error


def _read_fingerprint(record: Path) -> str | None:
    """Return the base model's fingerprint in a trainer's record; `None` if there is no record."""
    if not record.is_file():
        return None
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["base_model_fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{record}: has no base_model_fingerprint ({error!r})", "the record that the training wrote"
        ) from error


def check_injected(adapter: Adapter, state: Mapping[str, torch.Tensor], name: str) -> int:
    """Check that a model has every tensor of the adapter, bit for bit, and no other LoRA tensor under its name.

    `state` is the state dict of a model into which PEFT has loaded the adapter, and perhaps others. `name` is the
    adapter's name in PEFT. Returns the number of tensors.

    Raises:
        AdapterError: tensors are missing, unexpected or different. The message names them.
    """
    injected: dict[str, torch.Tensor] = {}
    part = re.compile(rf"\.(?:(lora_\w+)|modules_to_save)\.{re.escape(name)}(?=\.|$)")
    for key, tensor in state.items():
        plain = part.sub(lambda match: f".{match[1]}" if match[1] else "", key.removeprefix(_PREFIX))
        if plain != key.removeprefix(_PREFIX) or plain in adapter.tensors:
            injected[plain.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector")] = tensor
    missing = sorted(adapter.tensors.keys() - injected.keys())
    unexpected = sorted(injected.keys() - adapter.tensors.keys())
    different = sorted(name for name in adapter.tensors if name in injected and not _is_same(adapter, name, injected))
    wrong = {"not applied": missing, "without weights in the adapter": unexpected, "changed on loading": different}
    problems = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in wrong.items() if names]
    if problems:
        raise AdapterError(f"{adapter.path}: the adapter was not applied correctly: {'; '.join(problems)}")
    return len(adapter.tensors)


def _is_same(adapter: Adapter, name: str, injected: Mapping[str, torch.Tensor]) -> bool:
    stored, held = adapter.read(name), injected[name].detach().cpu()
    if ".lora_" in name:
        return bool(torch.equal(held.to(stored.dtype), stored))
    return bool(torch.equal(held, stored.to(held.dtype)))  # a replaced tensor is converted to the model's precision


def _read_config(path: Path) -> dict[str, Any]:
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if (path / name).is_file():
            continue
        several = sorted(file.parent.name for file in path.glob(f"*/{ADAPTER_CONFIG}"))
        if several:
            raise AdapterError(f"{path}: has the adapters {', '.join(several)}", "the folder of one of them")
        if name == ADAPTER_WEIGHTS and list(path.glob("adapter_model.*")):
            raise AdapterError(f"{path}: its weights are not a safetensors file", f"{name}, as saved by PEFT")
        raise AdapterError(f"{path}: has no {name}", "an adapter directory saved by PEFT")
    file = path / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: not a readable adapter: {ADAPTER_CONFIG}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterError(f"{file}: peft_type is {kind!r}", "'LORA'")
    for key, value in config.items():
        if not value or key in HARMLESS:
            continue
        if key in _REFUSED:
            raise AdapterError(f"{file}: {key} is set to {value!r}, which is not supported: {_REFUSED[key]}")
        if key not in _UNDERSTOOD:
            raise AdapterError(
                f"{file}: {key} is set to {value!r}, but lorasweep does not know its effect on merged weights"
            )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{file}: init_lora_weights is {init!r}, which changed the base model before the training",
            "the adapter converted to plain LoRA (PEFT's save_pretrained with "
            "path_initial_model_for_weight_conversion)",
        )
    for key, types in _TYPES.items():
        value = config.get(key)
        if (not value and key in _NEEDED) or (value and not isinstance(value, types)):
            raise AdapterError(f"{file}: {key} is {value!r}", "a value as written by PEFT")
    _check_with_peft(path)
    return config


def _check_with_peft(path: Path) -> None:
    """Let PEFT read a configuration and apply it to one layer, since it reads most values only when it applies them."""
    with _refuse_errors(path), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # unknown keys are refused above
        selection: dict[str, Any] = {**dict.fromkeys(_SELECTING), "target_modules": ["0"]}
        config = replace(PeftConfig.from_pretrained(str(path)), **selection, init_lora_weights=True)
        inject_adapter_in_model(config, torch.nn.Sequential(torch.nn.Linear(1, 1)))


def _sort_tensors(adapter: Adapter, base: Checkpoint, replaced: Set[str]) -> dict[str, dict[str, str]]:
    """Return the names of the LoRA tensors by module and part, and enter all others in `adapter.replaced`.

    Copies that PEFT saved without effect are removed from `adapter.tensors`. `replaced` are the modules that PEFT
    replaces.
    """
    architecture = read_architecture(base)
    modules: dict[str, dict[str, str]] = {}
    for name, tensor in list(adapter.tensors.items()):
        match = _LORA_NAME.fullmatch(name)
        if match:
            modules.setdefault(match["module"], {})[match["part"]] = name
            continue
        target = name.replace(".base_layer.", ".")  # PEFT saves a changed embedding together with its update
        module, _, kind = target.rpartition(".")
        is_bias = kind == "bias" and adapter.config.get("bias", "none") != "none"
        if target == name and not is_bias and not _is_within(module, replaced):
            if name not in {*architecture.embeddings, architecture.head}:
                raise AdapterError(
                    f"{adapter.path}: '{name}' is not a LoRA tensor",
                    "<module>.lora_A.weight and lora_B.weight, and tensors that bias or modules_to_save include",
                )
            _drop_copy(adapter, name, name, base)
            continue
        copy = _COPY_NAME.fullmatch(name)
        if copy:
            _drop_copy(adapter, name, f"{copy['module']}.{copy['kind']}", base, copy["copy"] == "modules_to_save")
            continue
        _check_shape(adapter, target, tensor.shape, base)
        adapter.replaced[target] = name
    for name in sorted(architecture.names):
        if name not in adapter.replaced and _is_within(name.rpartition(".")[0], replaced):
            raise AdapterError(
                f"{adapter.path}: {ADAPTER_CONFIG} includes '{name}' in modules_to_save, but there is no such tensor"
            )
    return modules


def _drop_copy(adapter: Adapter, name: str, target: str, base: Checkpoint, of_adapter: bool = False) -> None:
    """Remove a tensor that equals the base model's tensor `target`, or the adapter's.

    PEFT saves such copies of embeddings and heads if the vocabulary is larger than that of `base_model_name_or_path`.

    Raises:
        AdapterError: the tensor is not a copy.
    """
    if of_adapter:
        is_copy = target in adapter.tensors and torch.equal(adapter.read(name), adapter.read(target))
    else:
        _check_shape(adapter, target, adapter.tensors[name].shape, base)
        is_copy = not _differs(adapter, name, target, base)
    if not is_copy:
        raise AdapterError(
            f"{adapter.path}: '{name}' differs from the {'adapter' if of_adapter else 'base model'}'s '{target}'",
            "a copy of it, which PEFT saves if the vocabulary was resized before the training",
        )
    del adapter.tensors[name]


def _is_within(module: str, parents: Set[str]) -> bool:
    """Whether a module is one of the parents or a part of one."""
    path = module.split(".")
    return any(".".join(path[: index + 1]) in parents for index in range(len(path)))


def _check_values(adapter: Adapter, base: Checkpoint) -> None:
    effective = False
    nonzero: dict[str, bool] = {}
    for name in adapter.tensors:
        dtype = adapter.tensors[name].dtype
        if dtype not in DTYPES:
            raise AdapterError(f"{adapter.path}: '{name}' has dtype {dtype}", ", ".join(DTYPES))
        tensor = adapter.read(name)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{adapter.path}: '{name}' has values that are not finite")
        nonzero[name] = bool(tensor.any())
    for name, any_value in nonzero.items():
        other = name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
        effective |= any_value and name.endswith("lora_B.bias")
        effective |= any_value and other != name and nonzero.get(other, False)
    if not effective and not any(_differs(adapter, name, target, base) for target, name in adapter.replaced.items()):
        raise AdapterError(
            f"{adapter.path}: the adapter is zero: it has no effect, and would give the base model's results"
        )


def _differs(adapter: Adapter, name: str, target: str, base: Checkpoint) -> bool:
    """Whether a tensor of the adapter differs from the base model's parameter `target` in the base's precision."""
    stored = base.tensors[read_architecture(base).stored[target]]
    if stored.dtype not in DTYPES:
        return True
    old = read_tensor(base.path, stored)
    return not torch.equal(adapter.read(name).to(old.dtype), old)


def _add_update(adapter: Adapter, module: str, parts: dict[str, str], base: Checkpoint) -> None:
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    needed = {a, b} | ({"lora_magnitude_vector"} if adapter.config.get("use_dora") else set())
    allowed = needed | ({"lora_B.bias"} if adapter.config.get("lora_bias") and not embedding else set())
    if not needed <= parts.keys() <= allowed:
        dora = " with lora_magnitude_vector, since use_dora is set" if adapter.config.get("use_dora") else ""
        raise AdapterError(
            f"{adapter.path}: '{module}' has only {', '.join(sorted(parts))}", f"lora_A and lora_B{dora}"
        )
    shapes = {part: adapter.tensors[name].shape for part, name in parts.items()}
    if len(shapes[a]) != 2 or len(shapes[b]) != 2 or shapes[b][1] != shapes[a][0]:
        raise AdapterError(
            f"{adapter.path}: '{module}' has A of shape {list(shapes[a])} and B of shape {list(shapes[b])}",
            "two matrices of shapes [r, in] and [out, r]",
        )
    config, rank = adapter.config, shapes[a][0]
    stated = _match(config.get("rank_pattern"), module, config["r"])
    if stated != rank:
        raise AdapterError(f"{adapter.path}: '{module}' has rank {rank}, but {ADAPTER_CONFIG} says {stated}")
    alpha = _match(config.get("alpha_pattern"), module, config["lora_alpha"])
    transposed = embedding or f"{module}.weight" in read_architecture(base).conv1d
    out, width = shapes[b][0], shapes[a][1]
    _check_shape(adapter, f"{module}.weight", (width, out) if transposed else (out, width), base)
    if "lora_magnitude_vector" in parts and shapes["lora_magnitude_vector"] != (out,):
        raise AdapterError(
            f"{adapter.path}: '{module}' has {list(shapes['lora_magnitude_vector'])} magnitudes", f"[{out}]"
        )
    scale = alpha / sqrt(rank) if config.get("use_rslora") else alpha / rank
    adapter.updates[f"{module}.weight"] = Update(
        parts[a],
        parts[b],
        scale,
        transposed,
        parts.get("lora_magnitude_vector"),
        rounded_first=embedding or config.get("init_lora_weights") == "mica",
    )
    if "lora_B.bias" in parts:
        if f"{module}.bias" not in read_architecture(base).names:
            raise AdapterError(
                f"{adapter.path}: lora_bias trained a bias of '{module}', which has none in the base model "
                f"{base.path} to merge it into",
                "lora_bias: false, or modules that have a bias",
            )
        _check_shape(adapter, f"{module}.bias", shapes["lora_B.bias"], base)
        adapter.biases[f"{module}.bias"] = (parts["lora_B.bias"], scale)


def _check_shape(adapter: Adapter, name: str, shape: tuple[int, ...], base: Checkpoint) -> None:
    architecture = read_architecture(base)
    if name not in architecture.stored:
        if name in architecture.names:
            raise AdapterError(
                f"{adapter.path}: the adapter changes '{name}', which transformers makes of several tensors of the "
                f"base model {base.path}, or of none",
                "an adapter of parameters that the base model stores",
            )
        raise AdapterError(
            f"{adapter.path}: the adapter changes '{name}', which the base model {base.path} does not have: it was "
            "trained for another model, or its tensors have wrong names"
        )
    target = base.tensors[architecture.stored[name]]
    if target.shape != shape:
        raise AdapterError(
            f"{adapter.path}: '{name}' is {list(target.shape)} in the base model {base.path}, but {list(shape)} in the "
            "adapter, which was trained for another model"
        )


def _match(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """Return the value of the first pattern that matches a suffix of a module's name, like PEFT's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _check_targets(adapter: Adapter, modules: Set[str], targets: Set[str]) -> None:
    """Check that the adapter has tensors for exactly the modules that PEFT adapts."""
    extra, missing = sorted(modules - targets), sorted(targets - modules)
    if extra:
        raise AdapterError(
            f"{adapter.path}: has tensors for '{extra[0]}', which PEFT would not apply: {ADAPTER_CONFIG} does not "
            "target it, or PEFT renames them"
        )
    if missing:
        raise AdapterError(f"{adapter.path}: {ADAPTER_CONFIG} targets '{missing[0]}', which has no tensors")
