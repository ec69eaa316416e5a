"""Derive the tensors of a model from its `config.json`, without its weights.

Names and shapes are those of transformers' Llama, Mistral and Qwen2 (`modeling_llama.py`, `modeling_mistral.py`,
`modeling_qwen2.py`), the families that the trainer supports.
"""

import json
from math import prod
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.checkpoint import SINGLE, TOKENIZER_FILES, Checkpoint, Tensor, find_files
from lorasweep.checkpoints.dtypes import BITS, TORCH_NAMES
from lorasweep.util.errors import InputError

_BIASED = {"qwen2": ("q_proj", "k_proj", "v_proj")}
"""Names of projections with a bias, by `model_type`."""

FAMILIES = ("llama", "mistral", "qwen2")

_NEEDED = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")


def read_shape(path: Path) -> Checkpoint:
    """Return the checkpoint that a `config.json` in a directory describes, for computing sizes.

    It has tensors with their shapes, but no weights.

    Raises:
        InputError: `config.json` is missing or lacks a key, or the model family is not supported.
    """
    file = path / "config.json"
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"'{file}' cannot be read ({error})", "the config.json of a checkpoint") from error
    family = config.get("model_type")
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if family not in FAMILIES or missing:
        what = f"model_type {family!r}" if family not in FAMILIES else f"no {', '.join(missing)}"
        raise InputError(f"'{file}' has {what}; sizes can be computed for {', '.join(FAMILIES)} only")
    dtype = TORCH_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    tensors = {
        name: Tensor(SINGLE, dtype, shape, 0, prod(shape) * BITS[dtype] // 8)
        for name, shape in _get_shapes(config, str(family)).items()
    }
    return Checkpoint(path, config, (SINGLE,), tensors, find_files(path, TOKENIZER_FILES))


def _get_shapes(config: dict[str, Any], family: str) -> dict[str, tuple[int, ...]]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    projections = {
        "self_attn.q_proj": (attention, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, attention),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in projections.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if name.partition(".")[2] in _BIASED.get(family, ()):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes
