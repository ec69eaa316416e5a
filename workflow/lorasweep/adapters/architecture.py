"""Ask transformers and PEFT what they make of a checkpoint: names in memory, tied parameters, modules that LoRA adapts.

PEFT names the modules of the model in memory. A checkpoint may store them under other names: GPT-NeoX's `lm_head` is
`embed_out` on disk. Tied parameters are stored once. Lists of names would always be incomplete, so the model class is
instantiated on the meta device, which needs neither weights nor memory.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch.nn import Embedding
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from lorasweep.adapters.meta_model import instantiate
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.util.errors import InputError


@dataclass(frozen=True, eq=False)
class Architecture:
    """How the parameters of a model in memory are stored in its checkpoint."""

    stored: Mapping[str, str]
    """The tensor on disk that holds a parameter, by the parameter's name. Tied parameters have the same tensor.

    A parameter that is made of several tensors, such as the fused experts of a mixture, is not included.
    """
    names: frozenset[str]
    """Names of all parameters and buffers in memory."""
    conv1d: frozenset[str]
    """Names of the weights of linear layers that have shape [in, out], as in GPT-2."""
    embeddings: frozenset[str]
    """Names of the weights of embeddings."""
    head: str | None
    """Name of the head's weight."""
    ambiguous: frozenset[str]
    """Parameters that the configuration ties, although the checkpoint stores each of them."""
    is_known: bool = True
    """Whether transformers knows the model class. If not, names are those on disk, and tied parameters are unknown."""

    @cached_property
    def parameters(self) -> Mapping[str, list[str]]:
        """Names of the parameters that a tensor on disk holds, by its name; first the one that has its name."""
        parameters: dict[str, list[str]] = {}
        for parameter, name in self.stored.items():
            parameters.setdefault(name, []).append(parameter)
        return parameters


@lru_cache
def read_architecture(base: Checkpoint) -> Architecture:
    """Return the architecture of a base model. The result is cached.

    Raises:
        InputError: the model class cannot be instantiated with this configuration, or the checkpoint lacks the head.
    """
    model = instantiate(base.path, base.config.get("model_type"))
    if model is None:
        return _guess(base)
    stored = _find_stored(model, base)
    ambiguous = set()
    for parameter, source in model.all_tied_weights_keys.items():
        if parameter in stored and source in stored:
            ambiguous |= {parameter, source}
        elif parameter in stored or source in stored:
            tensor = stored.get(parameter) or stored[source]
            stored |= {parameter: tensor, source: tensor}
    head = _find_head(model)
    if head is not None and head not in stored:
        raise InputError(
            f"'{base.path}' has no {head}, and its config.json ties it to no other tensor (tie_word_embeddings)",
            "a configuration that agrees with the files",
        )
    names = frozenset(model.state_dict())
    conv1d, embeddings = _find_weights(model, Conv1D), _find_weights(model, Embedding)
    return Architecture(stored, names, conv1d, embeddings, head, frozenset(ambiguous))


@lru_cache
def find_targets(base: Checkpoint, selection: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the modules that PEFT adapts, and of those that it replaces. The result is cached.

    Args:
        selection: arguments of `LoraConfig` that select modules, as JSON.

    Raises:
        Exception: PEFT cannot apply this selection to this model; of any type.
    """
    config = LoraConfig(r=1, task_type="CAUSAL_LM", **json.loads(selection))
    model = instantiate(base.path, base.config.get("model_type")) or _imitate(base)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, model, low_cpu_mem_usage=True)

    def find(kind: type) -> frozenset[str]:
        return frozenset(name for name, module in model.named_modules() if isinstance(module, kind))

    targets = find(LoraLayer)
    if isinstance(model, PreTrainedModel):
        # On loading, PEFT renames tensors as transformers renames those of a checkpoint, and loses those misnamed.
        keys = {name: f"base_model.model.{name}.lora_A.weight" for name in targets}
        tensors = dict.fromkeys(keys.values(), torch.empty(1, 1))
        loaded = convert_peft_adapter_state_dict_for_transformers(model, config, tensors)
        targets = frozenset(name for name in targets if keys[name] in loaded)
    return targets, find(ModulesToSaveWrapper)


def can_untie(base: Checkpoint) -> bool:
    """Whether no parameters are tied if `tie_word_embeddings` is false."""
    model = instantiate(base.path, base.config.get("model_type"), tie_word_embeddings=False)
    return model is not None and not model.all_tied_weights_keys


def _find_weights(model: Any, kind: type) -> frozenset[str]:
    """Return the names of the weights of a kind of module."""
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kind))


def _find_stored(model: Any, base: Checkpoint) -> dict[str, str]:
    """Return the tensor on disk of each parameter that `from_pretrained` loads unchanged."""
    state = model.state_dict()
    find_parameter = make_parameter_finder(model, state)
    stored: dict[str, str] = {}
    for name in base.tensors:
        parameter, pattern = find_parameter(name)
        if pattern is not None or parameter not in state:
            continue
        if parameter in stored:
            raise InputError(f"'{base.path}' has {parameter} as {stored[parameter]} and as {name}", "one of them")
        stored[parameter] = name
    return stored


def make_parameter_finder(model: Any, state: Mapping[str, Any]) -> Callable[[str], tuple[str, str | None]]:
    """Return a function of a tensor's name on disk, by transformers' rules for loading a checkpoint into a model.

    It returns the parameter's name in memory, and the pattern of the rule by which transformers makes that parameter
    of several tensors; `None` if it is loaded unchanged. `state` is the model's state dict.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def find(name: str) -> tuple[str, str | None]:
        parameter, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        return (name, None) if parameter not in state and name in state else (parameter, pattern)

    return find


def _find_head(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)


def _guess(base: Checkpoint) -> Architecture:
    """Return what the names and shapes on disk say of a model whose class is unknown."""
    size = base.config.get("vocab_size")
    vocabulary = {name for name, tensor in base.tensors.items() if len(tensor.shape) == 2 and tensor.shape[0] == size}
    same = {name: name for name in base.tensors}
    return Architecture(same, frozenset(same), frozenset(), frozenset(vocabulary), None, frozenset(), is_known=False)


def _imitate(base: Checkpoint) -> torch.nn.Module:
    """Return modules on the meta device with the names on disk, where every matrix is the weight of a linear layer."""
    model = torch.nn.Module()
    matrices = {name for name, tensor in base.tensors.items() if len(tensor.shape) == 2}
    for name in base.tensors:
        *path, leaf = name.split(".")
        parent = model
        for depth, part in enumerate(path, start=1):
            if part not in dict(parent.named_children()):
                is_linear = f"{'.'.join(path[:depth])}.weight" in matrices
                parent.add_module(part, torch.nn.Linear(1, 1, device="meta") if is_linear else torch.nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False))
    return model
