"""Make a random checkpoint of some 100,000 parameters, with a tokenizer of its own, as Hugging Face writes it.

    python tests/tiny_model.py --family llama3 --output DIR

Run with an environment that has transformers (.venv/train or .venv/eval). The same arguments give the same bytes.
"""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

_SCALED = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# Those that torchtune trains. As the models of each family differ: heads, ties, RoPE.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama2": (LlamaConfig, {"num_key_value_heads": 4, "rope_theta": 10000.0}),
    "llama3": (LlamaConfig, {"rope_theta": 500000.0, "max_position_embeddings": 8192}),
    "llama3.1": (
        LlamaConfig,
        {"rope_theta": 500000.0, "rope_scaling": {**_SCALED, "factor": 8.0}, "max_position_embeddings": 131072},
    ),
    "llama3.2": (
        LlamaConfig,
        {
            "rope_theta": 500000.0,
            "rope_scaling": {**_SCALED, "factor": 32.0},
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "smollm2": (LlamaConfig, {"rope_theta": 100000.0, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"rope_theta": 1000000.0, "tie_word_embeddings": True}),
    "qwen2.5": (Qwen2Config, {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}),
    "mistral": (MistralConfig, {"rope_theta": 1000000.0, "sliding_window": None}),
}

_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "initializer_range": 0.1, "tie_word_embeddings": True}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# Others, with wider weights. Windows are shorter than the samples, heads wider than their share, multipliers not 1.
OTHER_FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": (Gemma2Config, {**_GEMMA, **_SLIDING}),
    "gemma3": (Gemma3TextConfig, {**_GEMMA, **_SLIDING}),
    "phi3": (Phi3Config, {"num_key_value_heads": 4, "sliding_window": 16}),
    "phi4": (Phi3Config, {"partial_rotary_factor": 1.0, "sliding_window": None, "rope_theta": 250000.0}),
    "mixtral": (MixtralConfig, {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": (Olmo2Config, {"rope_theta": 500000.0}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 1, 0], "tie_word_embeddings": True}),
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 2.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.5,
            "logits_scaling": 1.5,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox": (GPTNeoXConfig, {}),
    "gpt2": (GPT2Config, {"n_inner": 128, "max_position_embeddings": 512, "tie_word_embeddings": True}),
}

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|begin|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=(*FAMILIES, *OTHER_FAMILIES), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--no-chat-template", action="store_true")
    parser.add_argument("--shard-size", default="5GB", help="largest file of weights")
    arguments = parser.parse_args()
    tokenizer = make_tokenizer(has_chat_template=not arguments.no_chat_template)
    model = make_model(arguments.family, tokenizer, arguments.seed)
    model.to(getattr(torch, arguments.dtype)).save_pretrained(arguments.output, max_shard_size=arguments.shard_size)
    tokenizer.save_pretrained(arguments.output)


def save_model(directory: Path, family: str = "llama3") -> Path:
    """Write a checkpoint with a chat template."""
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model(family, tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tokenizer(has_chat_template: bool) -> PreTrainedTokenizerFast:
    """A byte is a token. As those of Llama 3 do, it puts a token in front of a text unless told not to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *SPECIAL_TOKENS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", vocabulary["<|begin|>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE if has_chat_template else None,
    )


def make_model(family: str, tokenizer: PreTrainedTokenizerFast, seed: int, **changes: Any) -> Any:
    """Weights are wide enough that answers differ; biases too. `changes` are of the model's configuration."""
    torch.manual_seed(seed)
    config_class, special = {**OTHER_FAMILIES, **FAMILIES}[family]
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family not in FAMILIES:  # GPT-2 has no heads of keys of its own, for one
        known = {*config_class.attribute_map, *(field.name for field in fields(config_class))}
        sizes = {key: value for key, value in sizes.items() if key in known} | {"initializer_range": 0.2}
    model = AutoModelForCausalLM.from_config(config_class(**{**sizes, **special, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


if __name__ == "__main__":
    main()
