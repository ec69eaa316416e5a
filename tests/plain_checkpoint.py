"""Make a checkpoint directory that looks whole, for what reads headers and configurations only: its weights are 0."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def write_checkpoint(
    directory: Path, shards: int = 1, biases: bool = False, chat_template: bool = True, **changes: Any
) -> Path:
    """Write a checkpoint with the configuration of a small Llama 3, and `changes` to it."""
    directory.mkdir(parents=True)
    config = {**LLAMA, **changes}
    (directory / "config.json").write_text(json.dumps(config))
    template = {"chat_template": "{{ messages }}"} if chat_template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(template))
    (directory / "tokenizer.json").write_text("{}")
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    if biases:
        shapes |= {f"model.layers.0.self_attn.{name}.bias": (hidden,) for name in ("q_proj", "k_proj", "v_proj")}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    if shards == 1:
        _save(shapes, list(shapes), directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{index % shards:05}.safetensors" for index, name in enumerate(shapes)}
    for shard in set(weight_map.values()):
        _save(shapes, [name for name in shapes if weight_map[name] == shard], directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def _save(shapes: dict[str, tuple[int, ...]], names: list[str], file: Path) -> None:
    save_file({name: np.zeros(shapes[name], np.float32) for name in names}, file)
