"""Choose the torchtune builder for the model in a checkpoint, by the checkpoint's config.json.

A model is accepted only if a builder represents it exactly. A wrong RoPE trains without an error and gives wrong
results.
"""

from typing import Any

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.experiment.sections import Controls
from lorasweep.util.errors import InputError

FAMILIES = "Llama 2, 3, 3.1 and 3.2, SmolLM2 (model_type llama), Qwen2 and Qwen2.5 (qwen2), Mistral (mistral)"

_NEEDED = (
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)

# Constants of torchtune's scaled RoPE (torchtune.models.llama3_1.Llama3ScaledRoPE).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def get_model(checkpoint: Checkpoint, controls: Controls) -> tuple[dict[str, Any], str]:
    """Return the `model` section of a recipe, and the checkpointer's `model_type`.

    Raises:
        InputError: no builder can represent this model. The message has the reason and the supported families.
    """
    config = checkpoint.config
    family = config.get("model_type")
    if family not in ("llama", "qwen2", "mistral"):
        raise _refuse(checkpoint, f"model_type {family!r}")
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise _refuse(checkpoint, f"no {', '.join(missing)} in config.json")
    _check_layers(checkpoint, family)
    rope = _get_rope(config)
    tied = bool(config.get("tie_word_embeddings", family == "llama" and checkpoint.tied))
    if tied != checkpoint.tied:
        raise _refuse(checkpoint, f"tie_word_embeddings {tied} with {'no' if checkpoint.tied else 'an'} lm_head.weight")
    if tied and controls.apply_lora_to_output:
        raise InputError(
            f"apply_lora_to_output: true is invalid for '{checkpoint.path}': its head is tied to the embeddings",
            "false",
        )
    component, model_type, extra = _get_builder(checkpoint, family, rope, tied)
    return {
        "_component_": component,
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "max_seq_len": config["max_position_embeddings"],
        "norm_eps": config["rms_norm_eps"],
        "rope_base": _whole(rope["rope_theta"]),
        **extra,
        **get_lora_arguments(controls),
    }, model_type


def get_lora_arguments(controls: Controls) -> dict[str, Any]:
    """Return the arguments that all LoRA builders of torchtune share."""
    return {
        "lora_attn_modules": list(controls.lora_attn_modules),
        "apply_lora_to_mlp": controls.apply_lora_to_mlp,
        "apply_lora_to_output": controls.apply_lora_to_output,
        "lora_rank": controls.lora_rank,
        "lora_alpha": controls.alpha,
        "lora_dropout": controls.lora_dropout,
    }


def _get_builder(
    checkpoint: Checkpoint, family: str, rope: dict[str, Any], tied: bool
) -> tuple[str, str, dict[str, Any]]:
    """Return the builder, the checkpointer's model type, and the builder's further arguments."""
    kind = rope["rope_type"]
    if family == "qwen2" and kind == "default":
        return "torchtune.models.qwen2.lora_qwen2", "QWEN2", {"tie_word_embeddings": tied}
    if family == "mistral" and kind == "default" and not tied:
        return "torchtune.models.mistral.lora_mistral", "MISTRAL", {}
    if family == "llama" and kind == "llama3":
        for key, built_in in _LLAMA3_ROPE.items():
            if float(rope.get(key, -1)) != built_in:
                raise _refuse(checkpoint, f"RoPE with {key} {rope.get(key)} (torchtune's is fixed at {built_in:g})")
        scale = {"scale_factor": _whole(rope["factor"])}
        if tied:
            return "torchtune.models.llama3_2.lora_llama3_2", "LLAMA3_2", {**scale, "tie_word_embeddings": True}
        return "torchtune.models.llama3_1.lora_llama3_1", "LLAMA3", scale
    if family == "llama" and kind == "default":
        # With a scale of 1, the scaled RoPE is the plain one. The builder's default is 32.
        if tied:
            return (
                "torchtune.models.llama3_2.lora_llama3_2",
                "LLAMA3_2",
                {"scale_factor": 1, "tie_word_embeddings": True},
            )
        return "torchtune.models.llama3.lora_llama3", "LLAMA3", {}
    raise _refuse(checkpoint, f"model_type {family} with {'tied embeddings and ' if tied else ''}RoPE of type {kind!r}")


def _check_layers(checkpoint: Checkpoint, family: str) -> None:
    config = checkpoint.config
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if head_dim * config["num_attention_heads"] != config["hidden_size"]:
        raise _refuse(checkpoint, f"head_dim {head_dim} (torchtune's builders use hidden_size / num_attention_heads)")
    if config.get("hidden_act", "silu") != "silu":
        raise _refuse(checkpoint, f"hidden_act {config['hidden_act']!r} (torchtune's builders use silu)")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise _refuse(checkpoint, f"{key} true")
    if config.get("quantization_config"):
        raise _refuse(checkpoint, "quantized weights (quantization_config in config.json)")
    has_biases = any(name.endswith("q_proj.bias") for name in checkpoint.tensors)
    if has_biases != (family == "qwen2"):
        raise _refuse(checkpoint, f"model_type {family} {'with' if has_biases else 'without'} biases in attention")
    window = config.get("sliding_window")
    used = family == "mistral" or config.get("use_sliding_window")
    if window and used and window < config["max_position_embeddings"]:
        raise _refuse(checkpoint, f"a sliding window of {window} tokens (torchtune's attention has no window)")


def _get_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return RoPE's parameters with `rope_type` and `rope_theta`, whichever version of transformers wrote them."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return rope


def _whole(number: float) -> float | int:
    """Return a float with an integer value as an int, as torchtune expects it."""
    return int(number) if float(number).is_integer() else number


def _refuse(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(
        f"'{checkpoint.path}' cannot be trained by torchtune: {what}. It trains {FAMILIES}",
        "trainer: trl, which trains any causal language model that transformers loads; or, if you know the right "
        "torchtune builder: controls._override.model (_component_ and arguments) and "
        "controls._override.checkpointer.model_type",
    )
