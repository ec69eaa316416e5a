"""Make a Llama of random weights and a given size, without a tokenizer."""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 49152
"""That of SmolLM2, so that its tokenizer fits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--billions", type=float, required=True, help="parameters, about")
    arguments = parser.parse_args()
    hidden, inner = 2048, 8192
    layer = 4 * hidden * hidden + 3 * hidden * inner
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, round((arguments.billions * 1e9 - VOCABULARY * hidden) / layer)),
        num_attention_heads=32,
        num_key_value_heads=32,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(arguments.output, max_shard_size="1GB")


if __name__ == "__main__":
    main()
