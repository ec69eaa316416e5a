"""PEFT adapter directories: is one whole, does it belong to this base model, and was all of it used.

An adapter that is silently not applied gives the base model's numbers under the adapter's name. So every merge and
every evaluation asks here first.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lorasweep.checkpoint import Checkpoint
from lorasweep.digest import digest_file
from lorasweep.errors import InputError
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD

_PREFIX = "base_model.model."
_TENSOR_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class AdapterError(InputError):
    """An adapter cannot be applied to its base model, or was not."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it lies on disk."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    """By PEFT's name less its prefix: `<module>.lora_A.weight` of shape [r, in], `<module>.lora_B.weight` [out, r]."""
    sha256: str
    """Of the weights file, in hexadecimal."""


def read_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Read an adapter, and check that it can change this base model.

    Raises:
        AdapterError: a missing or unreadable file, tensors that are not finite, an update that is zero throughout,
            an adapter of another base model: by the fingerprint in its record, by names, or by shapes.
    """
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (path / name).is_file():
            raise AdapterError(f"{path}: no {name}; accepted: a directory that PEFT saved an adapter to")
    try:
        config = json.loads((path / ADAPTER_CONFIG).read_text())
        tensors = load_file(path / ADAPTER_WEIGHTS)
    except (ValueError, SafetensorError) as error:
        raise AdapterError(f"{path}: not a readable adapter: {error}") from error
    record = path / RECORD
    trained_on = json.loads(record.read_text())["base_model_fingerprint"] if record.is_file() else base.fingerprint
    if trained_on != base.fingerprint:
        raise AdapterError(
            f"{path}: the adapter was trained on another base model (fingerprint {trained_on[:12]}) than {base.path} "
            f"(fingerprint {base.fingerprint[:12]})"
        )
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    _check_tensors(path, tensors, base)
    return Adapter(path, config, tensors, digest_file(path / ADAPTER_WEIGHTS))


def check_injected(adapter: Adapter, state: Mapping[str, torch.Tensor]) -> int:
    """Check that a model holds every tensor of the adapter, bit for bit, and no LoRA tensor beside them.

    `state` is the state dict of a model with the adapter injected, by PEFT or by transformers. Returns the number of
    tensors.

    Raises:
        AdapterError: naming the tensors that are missing, unexpected or different.
    """
    injected = {
        re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name.removeprefix(_PREFIX)): tensor
        for name, tensor in state.items()
        if ".lora_" in name
    }
    missing = sorted(adapter.tensors.keys() - injected.keys())
    unexpected = sorted(injected.keys() - adapter.tensors.keys())
    different = sorted(
        name
        for name, tensor in adapter.tensors.items()
        if name in injected and not torch.equal(injected[name].detach().to("cpu", tensor.dtype), tensor)
    )
    wrong = {"not applied": missing, "without weights in the adapter": unexpected, "changed on loading": different}
    said = [f"{len(names)} tensors {what} (first: {names[0]})" for what, names in wrong.items() if names]
    if said:
        raise AdapterError(f"{adapter.path}: the adapter was not applied as it is: {'; '.join(said)}")
    return len(adapter.tensors)


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], base: Checkpoint) -> None:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR_NAME.fullmatch(name)
        if not match:
            raise AdapterError(
                f"{path}: '{name}' is no LoRA tensor; accepted: <module>.lora_A.weight and lora_B.weight"
            )
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: '{name}' holds values that are not finite")
        modules.setdefault(match["module"], {})[match["side"]] = tensor
    if not modules:
        raise AdapterError(f"{path}: the adapter holds no tensor")
    for module, sides in modules.items():
        if sides.keys() != {"A", "B"}:
            raise AdapterError(f"{path}: '{module}' has lora_{''.join(sides)} alone; accepted: lora_A and lora_B")
        target = base.tensors.get(f"{module}.weight")
        if target is None:
            raise AdapterError(
                f"{path}: the adapter changes '{module}', which the base model {base.path} does not have: it was "
                "trained for another model, or its tensors are misnamed"
            )
        shape = (sides["B"].shape[0], sides["A"].shape[1])
        if target.shape != shape:
            raise AdapterError(
                f"{path}: '{module}' is {list(target.shape)} in the base model {base.path}, and {list(shape)} in the "
                "adapter: it was trained for another model"
            )
    if not any(sides["A"].any() and sides["B"].any() for sides in modules.values()):
        raise AdapterError(f"{path}: the adapter is zero: it changes nothing, and would give the base model's numbers")
