"""A merged model is bit for bit PEFT's, or is refused by name before anything is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from lorasweep.adapter import AdapterError
from lorasweep.checkpoint import read_checkpoint
from lorasweep.errors import InputError
from lorasweep.merge import merge, verify_merged
from tiny_model import FAMILIES, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES["gpt2"] = (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True})
FAMILIES["phi3"] = (Phi3Config, {})


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a tiny base model of a family, sharded or in one file."""

    @lru_cache
    def make(family: str, dtype: str = "bf16", shards: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("base") / f"{family}-{dtype}"
        tokenizer = make_tokenizer(has_chat_template=True)
        model = make_model(family, tokenizer, seed=1).to(DTYPES[dtype])
        model.save_pretrained(folder, max_shard_size="60KB" if shards else "5GB")
        tokenizer.save_pretrained(folder)
        return folder

    return make


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Let PEFT make an adapter, give it random weights, and save it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **settings}
    injected = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in injected.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" in name or "modules_to_save" in name or (name.endswith(".bias") and settings.get("bias")):
            torch.nn.init.normal_(parameter, std=0.1)
    injected.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapter: Path, dtype: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def find_differences(ours: dict[str, torch.Tensor], peft: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bits; PEFT's tied head is no tensor of its own."""
    tied = peft.keys() - ours.keys()
    assert tied <= {"lm_head.weight"} and ours.keys() <= peft.keys()
    return [n for n in ours if ours[n].dtype != peft[n].dtype or not torch.equal(ours[n], peft[n])]


SAME_AS_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "linear layers of Llama": ("llama3", {}),
    "linear layers of Qwen2": ("qwen2", {}),
    "linear layers of Qwen2.5": ("qwen2.5", {}),
    "linear layers of Mistral": ("mistral", {}),
    "fused projections of Phi-3": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "Conv1D of GPT-2, [in, out]": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "fan_in_fan_out of GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "fan_in_fan_out where PEFT corrects it": ("llama3", {"fan_in_fan_out": True}),
    "all-linear": ("llama3", {"target_modules": "all-linear"}),
    "a regular expression": ("llama3", {"target_modules": r".*layers\.[02]\..*(q|down)_proj"}),
    "exclude_modules": ("llama3", {"exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]}),
    "layers_to_transform": ("qwen2", {"layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one layer": ("llama3", {"layers_to_transform": 1}),
    "use_rslora": ("mistral", {"use_rslora": True, "r": 6}),
    "rank_pattern": ("llama3", {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 8}}),
    "alpha_pattern": ("llama3", {"alpha_pattern": {"v_proj": 5, "model.layers.0.mlp.up_proj": 7}}),
    "rsLoRA with both patterns": (
        "qwen2.5",
        {"use_rslora": True, "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"o_proj": 1, "k_proj": 9}},
    ),
    "a rank above the width": ("llama3", {"r": 96}),
    "rank 1": ("llama3", {"r": 1}),
    "DoRA": ("llama3", {"use_dora": True}),
    "DoRA with rsLoRA": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "DoRA of GPT-2": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    "DoRA of an embedding": ("llama3", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "bias: all": ("qwen2.5", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias: lora_only": ("qwen2.5", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2.5", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "modules_to_save": ("llama3", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "the embedding and the head": ("llama3", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "the embedding": ("mistral", {"target_modules": ["embed_tokens"]}),
    "gaussian initialisation": ("llama3", {"init_lora_weights": "gaussian"}),
    "orthogonal initialisation": ("llama3", {"init_lora_weights": "orthogonal"}),
    "MiCA": ("llama3", {"init_lora_weights": "mica", "target_modules": ["q_proj", "down_proj"]}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", SAME_AS_PEFT)
def test_a_merged_model_is_bit_for_bit_what_peft_makes(
    make_base: Callable[..., Path], tmp_path: Path, feature: str, dtype: str
) -> None:
    family, settings = SAME_AS_PEFT[feature]
    base = make_base(family, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    record = merge(base, adapter, tmp_path / "merged", threads=2, verify=True)
    ours = read_weights(tmp_path / "merged")
    assert find_differences(ours, merge_with_peft(base, adapter, dtype)) == []
    assert find_differences(ours, read_weights(base))  # and it is not the base
    assert record["verified_tensors"] > 0
