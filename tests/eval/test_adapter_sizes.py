"""What the plan says of an adapter is what PEFT saves: names, shapes, bytes, and the number of trained parameters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

from lorasweep.checkpoints.checkpoint import read_checkpoint, read_header
from lorasweep.checkpoints.lora import count_lora_parameters, find_modules, get_saved_rank, list_adapter_tensors
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.checkpoints.sizes import get_adapter_size, get_model_size
from lorasweep.experiment.sections import Controls
from tiny_model import make_tokenizer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
SMALL = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES),
    "gpt2": GPT2Config(**SMALL),
    "neox": GPTNeoXConfig(**NEOX),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for family, config in FAMILIES.items():
        folder = folders[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        make_tokenizer(has_chat_template=True).save_pretrained(folder)
    return folders


ADAPTERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    (
        "llama",
        {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": True},
    ),
    ("llama", {"lora_modules": ["embed_tokens", "v_proj"], "use_rslora": True}),
    ("llama", {"lora_modules": ["embed_tokens", "v_proj", "lm_head"], "use_dora": True}),
    ("llama", {"lora_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"lora_modules": "all-linear", "modules_to_save": ["norm"]}),
    ("llama", {"lora_modules": "all-linear", "init_lora_weights": "pissa"}),
    ("llama", {"lora_modules": "all-linear", "init_lora_weights": "olora"}),
    ("qwen3", {"lora_modules": "all-linear", "modules_to_save": ["lm_head"]}),
    ("qwen3", {"lora_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ("qwen3", {"lora_modules": ["q_proj", "v_proj"], "modules_to_save": ["v_proj"]}),
    ("qwen3", {"lora_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("gemma3", {"lora_modules": {"regex": r"model\.layers\.1\..*_proj"}, "use_dora": True}),
    ("gpt2", {"lora_modules": "all-linear", "modules_to_save": ["ln_f"]}),
    ("gpt2", {"lora_modules": ["c_attn", "wte"], "use_dora": True}),
    ("neox", {"lora_modules": "all-linear"}),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "keys"), ADAPTERS, ids=[f"{family}-{keys}" for family, keys in ADAPTERS])
def test_an_adapter_is_planned_as_peft_saves_it(
    bases: dict[str, Path], tmp_path: Path, family: str, keys: dict[str, Any], dtype: str
) -> None:
    base = read_checkpoint(bases[family])
    controls = Controls(lora_rank=4, **keys)
    start = {"kaiming": True}.get(controls.init_lora_weights, controls.init_lora_weights)
    model = AutoModelForCausalLM.from_pretrained(bases[family], dtype=torch.float32)
    config = LoraConfig(
        r=controls.lora_rank,
        lora_alpha=controls.alpha,
        target_modules=find_modules(base, controls),
        modules_to_save=controls.modules_to_save or None,
        use_dora=controls.use_dora,
        use_rslora=controls.use_rslora,
        init_lora_weights=start,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    assert count_lora_parameters(base, controls) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    conversion = {}
    if get_saved_rank(controls) != controls.lora_rank:
        config.init_lora_weights = True
        adapted.save_pretrained(tmp_path / "initial")
        config.init_lora_weights = start
        conversion = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    adapted.to(getattr(torch, dtype))
    # Else PEFT also saves the embeddings of the base model with an adapter of the head.
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False, **conversion)
    tensors = read_header(tmp_path / "adapter/adapter_model.safetensors")
    assert list_adapter_tensors(base, controls) == {name: tensor.shape for name, tensor in tensors.items()}
    # What PEFT converts, it saves in fp32.
    precision = "fp32" if conversion else {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    size = (tmp_path / "adapter/adapter_model.safetensors").stat().st_size
    assert get_adapter_size(base, controls, precision) == size


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_is_planned_as_transformers_saves_it(
    bases: dict[str, Path], tmp_path: Path, family: str
) -> None:
    (tmp_path / "config.json").write_bytes((bases[family] / "config.json").read_bytes())
    planned, saved = read_shape(tmp_path), read_checkpoint(bases[family])
    assert {name: tensor.shape for name, tensor in planned.tensors.items()} == {
        name: tensor.shape for name, tensor in saved.tensors.items()
    }
    assert planned.num_parameters == saved.num_parameters
    assert get_model_size(planned, "fp32") == (bases[family] / "model.safetensors").stat().st_size
