"""Build a model on torch's meta device by its `config.json`, without weights and without memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn import Embedding, Linear
from torch.nn.modules.conv import _ConvNd
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from lorasweep.util.errors import InputError

_NUMBERS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "max_positions": "max_position_embeddings",
    "experts_per_token": "num_experts_per_tok",
}
"""Transformers' names of what `Architecture` has of a configuration. Families with other names map them to these."""


def instantiate(path: Path, model_type: object, **changes: Any) -> Any:
    """Return the causal language model of a checkpoint directory on the meta device.

    `None` if transformers has no class for this `model_type`, or only custom code is one. `changes` are of its
    configuration.

    Raises:
        InputError: transformers cannot build the model; the message names `config.json`.
    """
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    try:
        config = CONFIG_MAPPING[model_type].from_pretrained(path, local_files_only=True, **changes)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except Exception as error:  # a configuration can be wrong in any way
        raise InputError(
            f"'{path / 'config.json'}': transformers cannot build this {model_type} model: "
            f"{type(error).__name__}: {error}"
        ) from error


def describe_model(path: Path, model_type: object) -> dict[str, Any] | None:
    """Return the fields of a model's `lorasweep.checkpoints.architecture.Architecture`; `None` as for `instantiate`."""
    model = instantiate(path, model_type)
    if model is None:
        return None
    modules = dict(model.named_modules())
    output = model.get_output_embeddings()
    head = next((name for name, module in modules.items() if module is output), None)
    tied = set(model.all_tied_weights_keys)
    parameters = {name: list(value.shape) for name, value in model.named_parameters() if name not in tied}
    ignored = tied | set(model._keys_to_ignore_on_save or ())
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    text = model.config.get_text_config()
    numbers = {field: getattr(text, name, None) for field, name in _NUMBERS.items()}
    return {
        "layers": {name: shape for name, module in modules.items() if (shape := _get_linear_shape(module))},
        "embeddings": {name: list(m.weight.shape) for name, m in modules.items() if isinstance(m, Embedding)},
        "head": head,
        "tied": f"{head}.weight" in tied or getattr(output, "weight", 0) is model.get_input_embeddings().weight,
        "fused": [name for name, shape in parameters.items() if _is_fused(name, shape, modules)],
        "parameters": parameters,
        "stored": {name: list(value.shape) for name, value in revert_weight_conversion(model, state).items()},
        **{field: value if isinstance(value, int) else None for field, value in numbers.items()},
    }


def _get_linear_shape(module: Any) -> list[int] | None:
    """Return [out, in] of a linear layer; `None` for another module."""
    if isinstance(module, Linear):
        return [module.out_features, module.in_features]
    return list(module.weight.shape[::-1]) if isinstance(module, Conv1D) else None


def _is_fused(name: str, shape: list[int], modules: Mapping[str, Any]) -> bool:
    """Whether a parameter holds a matrix for each of several experts: three dimensions, and no convolution."""
    owner = modules[name.rpartition(".")[0]]
    return len(shape) == 3 and min(shape) > 1 and not isinstance(owner, _ConvNd)
