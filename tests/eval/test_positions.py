"""Which models of transformers take sequences of any length, and which have a table of positions."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorasweep.experiment.sections import Controls
from lorasweep.trainers.trl import count_positions

MOST = 16
VOCABULARY = {"vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": MOST, "rotary_dim": 4}
WIDE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": MOST}


@pytest.mark.parametrize(
    ("family", "sizes", "has_table"),
    [
        ("gpt2", GPT, True),
        ("openai-gpt", GPT, True),
        ("gptj", GPT, True),
        ("codegen", GPT, True),
        ("ctrl", {**GPT, "dff": 32}, True),
        ("gpt_neo", {**WIDE, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}, True),
        ("opt", {**WIDE, "ffn_dim": 32, "word_embed_proj_dim": 16}, True),
        ("biogpt", {**WIDE, "intermediate_size": 32}, True),
        ("mpt", {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": MOST}, True),
        ("llama", {**WIDE, "intermediate_size": 32}, False),
        ("gpt_neox", {**WIDE, "intermediate_size": 32}, False),
        ("bloom", {"hidden_size": 16, "n_layer": 1, "n_head": 2}, False),
    ],
)
def test_a_model_that_fails_at_longer_sequences_is_known(family: str, sizes: dict[str, Any], has_table: bool) -> None:
    config = AutoConfig.for_model(family, **VOCABULARY, **sizes)
    model: Any = AutoModelForCausalLM.from_config(config)
    checkpoint: Any = SimpleNamespace(config=config.to_dict(), tensors=model.state_dict())
    assert count_positions(checkpoint, Controls()) == (MOST if has_table else None)
    model(input_ids=torch.ones(1, MOST, dtype=torch.long))
    try:
        model(input_ids=torch.ones(1, MOST + 1, dtype=torch.long))
    except (IndexError, RuntimeError):
        assert has_table
    else:
        assert not has_table
