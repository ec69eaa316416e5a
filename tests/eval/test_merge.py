"""A merged model is bit for bit PEFT's, or is refused by name before anything is written."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CTRLConfig,
    FalconH1Config,
    FalconMambaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LagunaConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    OpenAIGPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    XLMConfig,
)

import forked_evaluation
from lorasweep.adapters import merge as merge_module
from lorasweep.adapters.adapter import AdapterError, check_injected, read_adapter
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.util.errors import InputError
from tiny_model import FAMILIES, make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES["gpt2"] = (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True})
_TRANSFORMER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "dff": 128, "n_positions": 128, "tie_word_embeddings": True}
FAMILIES["phi3"] = (Phi3Config, {})
FAMILIES["gpt_neox"] = (GPTNeoXConfig, {})
FAMILIES["gpt_neox, tied"] = (GPTNeoXConfig, {"tie_word_embeddings": True})
FAMILIES["mamba"] = (MambaConfig, {"state_size": 4, "tie_word_embeddings": True})
FAMILIES["falcon_mamba"] = (FalconMambaConfig, {"state_size": 4, "tie_word_embeddings": True})
FAMILIES["ctrl"] = (CTRLConfig, _TRANSFORMER)
FAMILIES["openai-gpt"] = (OpenAIGPTConfig, _TRANSFORMER)
FAMILIES["xlm"] = (XLMConfig, {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "tie_word_embeddings": True})
FAMILIES["modernbert-decoder"] = (ModernBertDecoderConfig, {"tie_word_embeddings": True})
_EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES["qwen2_moe"] = (Qwen2MoeConfig, _EXPERTS)
FAMILIES["laguna"] = (LagunaConfig, {**_EXPERTS, "head_dim": 16})
FAMILIES["falcon_h1"] = (FalconH1Config, {"head_dim": 16})


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


def make_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """Let PEFT make an adapter, give it random weights, and save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **changes}
    injected = get_peft_model(model, LoraConfig(**config))
    for name, parameter in injected.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
        elif "lora_" in name or "modules_to_save" in name or (name.endswith(".bias") and config.get("bias")):
            torch.nn.init.normal_(parameter, std=0.1)
    injected.save_pretrained(folder)
    return folder


def merge_with_peft(base: Path, adapter: Path, dtype: str) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_model(model: Path, dtype: str) -> dict[str, torch.Tensor]:
    """Read a model's weights as transformers does, under their names in memory."""
    return dict(AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]).state_dict())


def find_differences(ours: dict[str, torch.Tensor], peft: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bits; PEFT's tied head is no tensor of its own."""
    tied = peft.keys() - ours.keys()
    assert tied <= {"lm_head.weight"}
    assert ours.keys() <= peft.keys()
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
    "a full name beside layers": ("llama3", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]}),
    "a block in modules_to_save": ("qwen2.5", {"target_modules": ["up_proj"], "modules_to_save": ["attn"]}),
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


NAMED_OTHERWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "the head of GPT-NeoX, which is embed_out on disk": ("gpt_neox", {"target_modules": ["lm_head", "dense"]}),
    "a new head of GPT-NeoX": ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["lm_head"]}),
    "the embedding of GPT-NeoX": ("gpt_neox", {"target_modules": ["embed_in", "query_key_value"]}),
    "the shared expert, which shares its experts' names": ("qwen2_moe", {"target_modules": LINEAR}),
    "a part of the shared expert": ("qwen2_moe", {"target_modules": r".*shared_expert\.(gate|down)_proj"}),
    "the layers of Mamba": ("mamba", {"target_modules": ["in_proj", "x_proj", "dt_proj"]}),
    "a configuration with infinity": ("falcon_h1", {"target_modules": ["q_proj", "lm_head"]}),
    "the layers of GPT": ("openai-gpt", {"target_modules": ["c_attn", "c_proj"]}),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("feature", NAMED_OTHERWISE)
def test_a_model_that_is_stored_under_other_names_is_merged_where_peft_merges_it(
    make_base: Callable[..., Path], tmp_path: Path, feature: str, dtype: str
) -> None:
    family, settings = NAMED_OTHERWISE[feature]
    base = make_base(family, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(base, adapter, tmp_path / "merged", verify=True)
    ours = read_model(tmp_path / "merged", dtype)
    assert find_differences(ours, merge_with_peft(base, adapter, dtype)) == []
    assert find_differences(ours, read_model(base, dtype))
    assert read_weights(tmp_path / "merged").keys() == read_weights(base).keys()


def test_tensors_that_peft_renames_and_loses_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("laguna")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["shared_experts.down_proj"])
    assert find_differences(merge_with_peft(base, adapter, "bf16"), read_model(base, "bf16")) == []
    with pytest.raises(
        AdapterError, match=r"'model.layers.\d.mlp.shared_experts.down_proj', which PEFT would not apply"
    ):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("targets", [["c_attn", "c_proj"], ["lm_head", "c_attn"], ["wte"]])
def test_a_base_that_was_saved_without_its_head_is_merged_as_with_it(
    make_base: Callable[..., Path], tmp_path: Path, targets: list[str]
) -> None:
    """As GPT-2 is on the hub, whose names lack `transformer.`."""
    whole = make_base("gpt2", "fp32")
    AutoModelForCausalLM.from_pretrained(whole).transformer.save_pretrained(tmp_path / "base")
    make_tokenizer(has_chat_template=True).save_pretrained(tmp_path / "base")
    adapter = make_adapter(whole, tmp_path / "adapter", target_modules=targets)
    merge(tmp_path / "base", adapter, tmp_path / "merged", verify=True)
    assert "h.0.attn.c_attn.weight" in read_weights(tmp_path / "merged")
    merge(whole, adapter, tmp_path / "other")
    assert find_differences(read_model(tmp_path / "merged", "fp32"), read_model(tmp_path / "other", "fp32")) == []
    assert_same_logits(whole, adapter, tmp_path / "merged")


@pytest.mark.parametrize(("stored", "dtype"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("fp32", "fp16")])
def test_another_precision_is_that_of_peft_with_the_base_loaded_in_it(
    make_base: Callable[..., Path], tmp_path: Path, stored: str, dtype: str
) -> None:
    base = make_base("qwen2.5", stored)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"], bias="all")
    merge(base, adapter, tmp_path / "merged", dtype, verify=True)
    assert find_differences(read_weights(tmp_path / "merged"), merge_with_peft(base, adapter, dtype)) == []
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == DTYPES[dtype]


def test_a_bf16_adapter_is_merged_as_peft_merges_it(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama3")
    file = make_adapter(base, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    merge(base, tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert (
        find_differences(read_weights(tmp_path / "merged"), merge_with_peft(base, tmp_path / "adapter", "bf16")) == []
    )


def test_shards_threads_and_repetition_change_no_bit(make_base: Callable[..., Path], tmp_path: Path) -> None:
    sharded, single = make_base("llama3"), make_base("llama3", shards=False)
    adapter = make_adapter(sharded, tmp_path / "adapter")
    records = [merge(sharded, adapter, tmp_path / f"{n}", threads=n) for n in (1, 4)]
    merge(single, adapter, tmp_path / "single")
    assert len(list(sharded.glob("*.safetensors"))) > 5
    assert records[0] == records[1]
    assert find_differences(read_weights(tmp_path / "single"), read_weights(tmp_path / "4")) == []
    assert (tmp_path / "single/model.safetensors").is_file()


TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "the head": ("qwen2", {"target_modules": ["lm_head", "q_proj"]}),
    "the embedding": ("qwen2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "both": ("llama3.2", {"target_modules": ["lm_head", "embed_tokens"]}),
    "a new head": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "a new embedding": ("smollm2", {"modules_to_save": ["embed_tokens"]}),
    "the head of GPT-2": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
    "the embedding of GPT-2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "the head of GPT-NeoX": ("gpt_neox, tied", {"target_modules": ["lm_head"]}),
    "a new embedding of GPT-NeoX": ("gpt_neox, tied", {"modules_to_save": ["embed_in"], "target_modules": ["dense"]}),
    "a new embedding of Mamba": ("mamba", {"modules_to_save": ["embeddings"], "target_modules": ["in_proj"]}),
    "a new embedding of Falcon-Mamba": (
        "falcon_mamba",
        {"modules_to_save": ["embeddings"], "target_modules": ["in_proj"]},
    ),
    "the head of Mamba": ("mamba", {"target_modules": ["lm_head"]}),
    "a new embedding of CTRL": ("ctrl", {"modules_to_save": ["w"], "target_modules": ["Wq"]}),
    "a new embedding of GPT": ("openai-gpt", {"modules_to_save": ["tokens_embed"], "target_modules": ["c_attn"]}),
    "a new embedding of XLM": ("xlm", {"modules_to_save": ["embeddings"], "target_modules": ["q_lin"]}),
    "a new embedding of ModernBERT": (
        "modernbert-decoder",
        {"modules_to_save": ["tok_embeddings"], "target_modules": ["q_proj"]},
    ),
    "the head of ModernBERT, which is decoder": ("modernbert-decoder", {"target_modules": ["decoder"]}),
}


@pytest.mark.parametrize("case", TIED)
def test_a_change_to_one_of_two_tied_matrices_unties_them(
    make_base: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """PEFT's own merge changes both, or loses the head when the model is read again; the adapter acts on one."""
    family, settings = TIED[case]
    base = make_base(family, "fp32")
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    assert merge(base, adapter, tmp_path / "merged", verify=True)["unties_embedding"]
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    assert_same_logits(base, adapter, tmp_path / "merged")


def assert_same_logits(base: Path, adapter: Path, merged: Path) -> None:
    """The merged model answers as base and adapter do, and not as the base alone."""
    tokens = torch.arange(40)[None] * 6
    with torch.inference_mode():
        direct = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(tokens).logits
        ours = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(tokens).logits
    assert (ours - direct).abs().max() < 1e-4 * direct.abs().max()
    assert (ours - plain).abs().max() > 1e-2 * plain.abs().max()


def test_a_tied_model_whose_embedding_is_left_alone_stays_tied(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2")
    merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    assert "lm_head.weight" not in read_weights(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is True


def set_key(key: str, value: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))

    return change


def set_base_key(base: Path, key: str, value: Any) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {key: value}))


def edit(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        file = adapter / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return apply


def nest(adapter: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(adapter, adapter.parent / "nested" / name)
    shutil.rmtree(adapter)
    (adapter.parent / "nested").rename(adapter)


def cut(size: int) -> Callable[[Path], None]:
    return lambda adapter: os.truncate(adapter / "adapter_model.safetensors", size)


def pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def poison_record(adapter: Path) -> None:
    (adapter / "lorasweep.json").write_text("{}")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "another method": (set_key("peft_type", "LOHA"), "peft_type is 'LOHA'. Expected: 'LORA'"),
    "aLoRA": (set_key("alora_invocation_tokens", [1, 2]), "alora_invocation_tokens is set"),
    "Arrow": (set_key("arrow_config", {"top_k": 2}), "arrow_config is set"),
    "KaSA": (set_key("kasa_config", {"beta": 0.1}), "kasa_config is set"),
    "layer replication": (set_key("layer_replication", [[0, 2], [1, 3]]), "layer_replication is set"),
    "Megatron": (set_key("megatron_config", {"a": 1}), "megatron_config is set"),
    "MonteCLoRA": (set_key("monteclora_config", {"num_samples": 8}), "monteclora_config is set"),
    "single parameters": (set_key("target_parameters", ["experts.w"]), "target_parameters is set"),
    "single tokens": (set_key("trainable_token_indices", [1, 2]), "trainable_token_indices is set"),
    "BD-LoRA": (set_key("use_bdlora", {"nblocks": 2}), "use_bdlora is set"),
    "QA-LoRA": (set_key("use_qalora", True), "use_qalora is set"),
    "VeLoRA": (set_key("velora_config", {"a": 1}), "velora_config is set"),
    "a feature of tomorrow": (
        set_key("use_tomorrow", True),
        "use_tomorrow is set to True, but lorasweep does not know",
    ),
    "PiSSA": (set_key("init_lora_weights", "pissa_niter_4"), "init_lora_weights is 'pissa_niter_4'"),
    "OLoRA": (set_key("init_lora_weights", "OLORA"), "init_lora_weights is 'OLORA'"),
    "CorDA": (set_key("init_lora_weights", "corda"), "init_lora_weights is 'corda'"),
    "LoftQ": (set_key("init_lora_weights", "loftq"), "init_lora_weights is 'loftq'"),
    "LoRA-GA": (set_key("init_lora_weights", "lora_ga"), "init_lora_weights is 'lora_ga'"),
    "no targets": (set_key("target_modules", None), "target_modules is None"),
    "no rank": (set_key("r", 0), "r is 0"),
    "another rank": (set_key("r", 5), "has rank 4, but adapter_config.json says 5"),
    "fewer targets": (
        set_key("target_modules", ["q_proj"]),
        "which PEFT would not apply: adapter_config.json does not target it",
    ),
    "more targets": (
        set_key("target_modules", [*LINEAR, "lm_head"]),
        "targets 'lm_head', which has no tensors",
    ),
    "DoRA without magnitudes": (set_key("use_dora", True), "with lora_magnitude_vector, since use_dora is set"),
    "a tensor too many": (
        edit(lambda t: t | {f"{Q}.weight": torch.ones(64, 64)}),
        "q_proj.weight' is not a LoRA tensor",
    ),
    "magnitudes without DoRA": (
        edit(lambda t: t | {f"{Q}.lora_magnitude_vector": torch.ones(64)}),
        "q_proj' has only lora_A.weight, lora_B.weight, lora_magnitude_vector",
    ),
    "several adapters": (nest, "has the adapters first, second. Expected: the folder of one"),
    "a name within the tensors": (
        edit(lambda t: {name.replace(".weight", ".default.weight"): tensor for name, tensor in t.items()}),
        "is not a LoRA tensor",
    ),
    "integers": (
        edit(lambda t: {name: tensor.int() for name, tensor in t.items()}),
        "has dtype I32. Expected: F64, F32",
    ),
    "infinity": (edit(lambda t: t | {f"{Q}.lora_A.weight": torch.full((4, 64), torch.inf)}), "not finite"),
    "three dimensions": (edit(lambda t: {n: tensor[None] for n, tensor in t.items()}), "Expected: two matrices"),
    "a rank in quotes": (set_key("r", "4"), "r is '4'. Expected: a value as written by PEFT"),
    "patterns in a list": (set_key("alpha_pattern", ["q_proj"]), r"alpha_pattern is \['q_proj'\]. Expected"),
    "no regular expression": (set_key("rank_pattern", {"q_(": 4}), r"'.*q_\(.*' is not a regular expression"),
    "a module that was not saved": (
        set_key("modules_to_save", ["lm_head"]),
        "includes 'lm_head.weight' in modules_to_save, but there is no such tensor",
    ),
    "a tensor twice": (
        edit(lambda t: t | {f"{Q[17:]}.lora_A.weight": torch.ones(4, 64)}),
        "PEFT would ignore 1 of 43 tensors",
    ),
    "no prefix": (
        edit(lambda t: {name.removeprefix("base_model.model."): tensor for name, tensor in t.items()}),
        "PEFT would ignore 42 of 42 tensors .* Expected: names that begin with 'base_model.model.'",
    ),
    "a pattern that is null": (set_key("rank_pattern", None), "PEFT cannot apply it: AttributeError"),
    "an unknown bias": (set_key("bias", "some"), "PEFT cannot apply it: .*bias: some"),
    "a pattern as text": (set_key("alpha_pattern", "q_proj"), "alpha_pattern is 'q_proj'"),
    "a dropout of 2": (
        set_key("lora_dropout", 2),
        "PEFT cannot apply it: .*between 0 and 1, but got 2",
    ),
    "an unknown task": (set_key("task_type", "DREAM"), "PEFT cannot apply it: .*Invalid task type"),
    "a record of something else": (poison_record, "lorasweep.json: has no base_model_fingerprint"),
    "a pickle": (pickle, "its weights are not a safetensors file"),
    "an empty file": (cut(0), "not a safetensors file"),
    "a header cut short": (cut(100), "not a safetensors file"),
    "values cut short": (cut(20_000), "is truncated"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_merged_is_refused_by_name_before_a_byte_is_written(
    make_base: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    base = make_base("llama3")
    change, said = REFUSED[case]
    change(make_adapter(base, tmp_path / "adapter"))
    with pytest.raises(AdapterError, match=said) as error:
        merge(base, tmp_path / "adapter", tmp_path / "results/merged")
    assert str(tmp_path / "adapter") in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_of_a_model_of_other_shapes_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(make_base("llama2"), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"'model.layers.0.self_attn.k_proj.weight' is \[32, 64\] .* but \[64, 64\]"):
        merge(make_base("llama3"), adapter, tmp_path / "merged")


def resize(base: Path, folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Add tokens to a base, save it, and let PEFT train on it without being told of the new folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(280, mean_resizing=False)
    model.save_pretrained(folder / "base")
    make_tokenizer(has_chat_template=True).save_pretrained(folder / "base")
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"], **changes}
    injected = get_peft_model(model, LoraConfig(**config))
    for name, parameter in injected.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    injected.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


RESIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("qwen2.5", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "the embedding": ("qwen2.5", {"modules_to_save": ["embed_tokens"]}),
    "neither": ("qwen2.5", {}),
    "the embedding as a target": ("qwen2.5", {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}),
    "both of a tied model": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "the embedding of a tied model": ("qwen2", {"modules_to_save": ["embed_tokens"]}),
    "neither of a tied model": ("qwen2", {}),
}


@pytest.mark.parametrize("case", RESIZED)
def test_copies_that_peft_saves_of_a_resized_vocabulary_change_nothing(
    make_base: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    family, settings = RESIZED[case]
    base, adapter = resize(make_base(family, "fp32"), tmp_path, **settings)
    merge(base, adapter, tmp_path / "merged", verify=True)
    assert_same_logits(base, adapter, tmp_path / "merged")
    if family == "qwen2.5":
        ours = read_weights(tmp_path / "merged")
        assert find_differences(ours, merge_with_peft(base, adapter, "fp32")) == []
    else:
        assert ("lm_head.weight" in read_weights(tmp_path / "merged")) == bool(settings)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embed_tokens.modules_to_save.weight", "differs from the adapter's 'model.embed_tokens.weight'"),
        ("embed_tokens.original_module.weight", "differs from the base model's 'model.embed_tokens.weight'"),
    ],
)
def test_a_copy_that_differs_is_refused(make_base: Callable[..., Path], tmp_path: Path, name: str, said: str) -> None:
    base, adapter = resize(make_base("qwen2", "fp32"), tmp_path, modules_to_save=["embed_tokens"])
    edit(lambda t: {key: tensor + (name in key) for key, tensor in t.items()})(adapter)
    with pytest.raises(AdapterError, match=said):
        merge(base, adapter, tmp_path / "merged")


def test_tensors_without_the_prefix_have_no_effect_in_peft(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """So that it would be wrong to merge them."""
    base = make_base("llama3")
    REFUSED["no prefix"][0](make_adapter(base, tmp_path / "adapter"))
    assert find_differences(merge_with_peft(base, tmp_path / "adapter", "bf16"), read_model(base, "bf16")) == []


TEMPLATES = {
    "chat_template.jinja": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}",
    "additional_chat_templates/tool_use.jinja": "{% for m in messages %}<tools> {{ m['content'] }}{% endfor %}",
    "additional_chat_templates/rag.jinja": "{% for m in messages %}<documents> {{ m['content'] }}{% endfor %}",
}
OTHERS = {
    "spiece.model": "pieces",
    "qwen.tiktoken": "tokens",
    "chat_template.json": "{}",
    "modeling_own.py": "code = 1",
    "custom_generate/generate.py": "def generate(): ...",
}


def test_prompts_of_a_merged_model_are_those_of_its_base(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base("llama3"), tmp_path / "base"))
    set_base_key(base, "auto_map", {"AutoModelForCausalLM": "modeling_own.Own"})
    for name, content in (TEMPLATES | OTHERS).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    record = merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "merged")]
    messages = [{"role": "user", "content": "hello"}]
    prompts = {
        name: [t.apply_chat_template(messages, chat_template=name, tokenize=False) for t in tokenizers]
        for name in ("default", "tool_use", "rag")
    }
    assert [ours for _, ours in prompts.values()] == ["[user] hello", "<tools> hello", "<documents> hello"]
    assert all(theirs == ours for theirs, ours in prompts.values())
    tokenizers[0].save_pretrained(tmp_path / "saved")
    merged = list_files(tmp_path / "merged")
    assert {*list_files(tmp_path / "saved"), *TEMPLATES, *OTHERS} <= merged.keys()
    assert {name: merged[name].decode() for name in OTHERS} == OTHERS
    assert {*record["sha256"], "config.json", "lorasweep.json"} == merged.keys()
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert list_files(tmp_path / "merged") == merged


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"quantized \(bitsandbytes\)",
        ),
        ({"tie_word_embeddings": True}, "both sets tie_word_embeddings and has lm_head.weight and model.embed_tokens"),
    ],
    ids=["4-bit", "tied twice"],
)
def test_a_base_that_cannot_be_merged_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(make_base("llama3"), tmp_path / "adapter", target_modules=["lm_head"])
    base = Path(shutil.copytree(make_base("llama3"), tmp_path / "base"))
    for key, value in changes.items():
        set_base_key(base, key, value)
    with pytest.raises(InputError, match=said):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("output", ["base", "adapter", ".", "notes", "another", "notes/thesis.tex", "link", "dangling"])
def test_nothing_but_a_merged_model_is_ever_replaced(
    make_base: Callable[..., Path], tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(make_base("llama3"), tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    (shutil.copytree(adapter, tmp_path / "another") / "lorasweep.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = list_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"Expected: (another|a new) directory"):
        merge(Path("base"), Path("adapter"), Path(output))
    assert list_files(tmp_path) == before
    merge(Path("base"), Path("adapter"), Path("empty"))
    merge(Path("base"), Path("adapter"), Path("empty"))
    assert (tmp_path / "link/config.json").is_file()


def test_two_merges_to_one_place_do_not_mix(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    make_record = merge_module.digest_weights
    refused = []

    def merge_again(digests: dict[str, str]) -> str:
        monkeypatch.setattr(merge_module, "digest_weights", make_record)
        with pytest.raises(InputError, match="another process is merging to it"):
            merge(base, adapter, tmp_path / "merged")
        refused.append(True)
        return make_record(digests)

    monkeypatch.setattr(merge_module, "digest_weights", merge_again)
    merge(base, adapter, tmp_path / "merged", verify=True)
    assert refused == [True]
    assert find_differences(read_weights(tmp_path / "merged"), merge_with_peft(base, adapter, "bf16")) == []


def test_a_model_that_cannot_take_its_place_leaves_the_old_one_there(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    before = list_files(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("the server is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="the server is gone"):
        merge(base, adapter, tmp_path / "merged")
    assert list_files(tmp_path) == before


def test_tensors_of_another_precision_than_most_keep_it(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base("llama3", shards=False), tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-5
    save_file(weights, base / "model.safetensors")
    merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged", "bf16", verify=True)
    merged = read_weights(tmp_path / "merged")
    assert torch.equal(merged["model.norm.weight"], weights["model.norm.weight"])
    assert {tensor.dtype for name, tensor in merged.items() if name != "model.norm.weight"} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_dora": True}, {"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}],
    ids=["LoRA", "DoRA", "embedding", "modules_to_save"],
)
def test_an_adapter_that_was_never_trained_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    base = make_base("llama3", "fp32")
    config = {"r": 4, "target_modules": LINEAR, **changes}
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**config)).save_pretrained(tmp_path / "new")
    with pytest.raises(AdapterError, match="the adapter is zero"):
        merge(base, tmp_path / "new", tmp_path / "merged")


def test_a_base_in_float64_is_refused(large: tuple[Path, Path], tmp_path: Path) -> None:
    write_base(tmp_path / "base", {name[:-7]: tensor for name, tensor in read_weights(large[0]).items()}, torch.float64)
    with pytest.raises(InputError, match=r"as F64\. Expected: F32, F16, BF16"):
        merge(tmp_path / "base", large[1], tmp_path / "merged")


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_an_embedding_that_was_changed_before_the_training_is_the_base_of_both_sides(
    make_base: Callable[..., Path], tmp_path: Path, side: str
) -> None:
    base = make_base("qwen2", "fp32")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[side, "q_proj"])

    def shift(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if "base_layer" in name)
        return tensors | {name: tensors[name] + (torch.arange(260) < 50)[:, None] * 0.5}

    edit(shift)(adapter)
    merge(base, adapter, tmp_path / "merged", verify=True)
    assert_same_logits(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["embed_tokens"]}])
def test_an_embedding_of_a_model_class_that_transformers_does_not_know_is_refused_unless_it_is_not_tied(
    make_base: Callable[..., Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    for family in ("qwen2", "qwen2.5"):
        known = make_base(family, "fp32")
        base = Path(shutil.copytree(known, tmp_path / f"{family}/base"))
        adapter = make_adapter(base, tmp_path / f"{family}/adapter", **changes)
        set_base_key(base, "model_type", "unheard_of")
        if family == "qwen2":
            with pytest.raises(
                AdapterError, match=r"changes model.embed_tokens.weight, but .* tied weights are unknown"
            ):
                merge(base, adapter, tmp_path / "merged")
        else:
            merge(base, adapter, tmp_path / "merged")
            assert find_differences(read_weights(tmp_path / "merged"), merge_with_peft(known, adapter, "fp32")) == []


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox, tied"])
def test_a_base_without_the_head_that_its_configuration_asks_for_is_refused(
    make_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    base = Path(shutil.copytree(make_base(family), tmp_path / "base"))
    module = "embed_in" if "neox" in family else "embed_tokens"
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=[module])
    set_base_key(base, "tie_word_embeddings", False)
    with pytest.raises(InputError, match=r"has no lm_head.weight, and its config.json ties it to no other tensor"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_head_under_another_name_that_the_configuration_ties_is_refused(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(make_base("gpt_neox"), tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["dense"], modules_to_save=["lm_head"])
    set_base_key(base, "tie_word_embeddings", True)
    with pytest.raises(AdapterError, match=r"changes lm_head.weight, but .* both sets tie_word_embeddings and has"):
        merge(base, adapter, tmp_path / "merged")


def test_a_merged_weight_that_overflows_is_named_and_nothing_is_left(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("llama3", "fp16")
    adapter = make_adapter(base, tmp_path / "adapter")
    edit(lambda t: t | {f"{Q}.lora_B.weight": torch.full((64, 4), 3e5)})(adapter)
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj.weight: .* not finite in torch.float16"):
        merge(base, adapter, tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_updates_that_the_precision_swallows_are_told(
    make_base: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    edit(lambda t: t | {f"{Q}.lora_B.weight": torch.full((64, 4), 1e-9)})(adapter)
    record = merge(base, adapter, tmp_path / "merged")
    assert record["weights_lost_to_rounding"] == ["model.layers.0.self_attn.q_proj.weight"]
    assert "1 of 21 weights are unchanged" in capsys.readouterr().out


def test_a_temporary_model_links_to_shards_that_do_not_change_and_a_kept_one_shares_none(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("llama3")
    before = {file.name: sha256(file.read_bytes()).hexdigest() for file in base.iterdir()}
    adapter = make_adapter(base, tmp_path / "adapter", layers_to_transform=[1])
    temporary = merge(base, adapter, tmp_path / "temporary", temporary=True, verify=True)
    kept = merge(base, adapter, tmp_path / "kept", verify=True)
    links = [file for file in (tmp_path / "temporary").iterdir() if file.is_symlink()]
    assert len(links) > 2
    assert temporary["bytes_linked"] == sum(link.stat().st_size for link in links)
    assert temporary["bytes_written"] + temporary["bytes_linked"] == kept["bytes_written"]
    assert temporary["sha256"] == kept["sha256"]
    assert find_differences(read_weights(tmp_path / "temporary"), merge_with_peft(base, adapter, "bf16")) == []
    inodes = {file.stat().st_ino for file in base.iterdir()}
    assert not [file for file in (tmp_path / "kept").iterdir() if file.is_symlink() or file.stat().st_ino in inodes]
    shutil.rmtree(tmp_path / "temporary")
    assert {file.name: sha256(file.read_bytes()).hexdigest() for file in base.iterdir()} == before


def test_the_digests_are_those_that_sha256sum_prints(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama3")
    record = merge(base, make_adapter(base, tmp_path / "adapter"), tmp_path / "merged")

    def shell(command: str) -> str:
        return subprocess.run(command, shell=True, cwd=tmp_path / "merged", capture_output=True, text=True).stdout

    assert shell("sha256sum *.safetensors | sha256sum").split()[0] == record["weights_sha256"]
    assert shell("sha256sum model-00001-of-*.safetensors").split()[0] in record["sha256"].values()
    assert json.loads((tmp_path / "merged/lorasweep.json").read_text()) == record
    assert {*record["sha256"], "config.json", "lorasweep.json"} == {f.name for f in (tmp_path / "merged").iterdir()}


@pytest.mark.parametrize("verified", [True, False])
def test_verification_finds_a_wrong_sum_and_keeps_the_old_model(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verified: bool
) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    right = merge(base, adapter, tmp_path / "merged", verify=True)
    product = torch.mm

    def wrong(b: torch.Tensor, a: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return product(b, a, out=out).add_(0.5)

    monkeypatch.setattr(torch, "mm", wrong)
    if verified:
        with pytest.raises(InputError, match="differs from the base model merged with the adapter"):
            merge(base, adapter, tmp_path / "merged", verify=True)
        assert json.loads((tmp_path / "merged/lorasweep.json").read_text()) == right
    else:
        assert merge(base, adapter, tmp_path / "merged")["weights_sha256"] != right["weights_sha256"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "merged"]


def test_too_little_room_is_said_before_the_first_byte(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"No space left on device: .* needs [\d.]+ kB, but 1 kB are free in"):
        merge(base, adapter, tmp_path / "results/merged")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}


def name_files(base: Path, adapter: Path, output: Path) -> list[str | Path]:
    return ["job", "merge", "--base", base, "--adapter", adapter, "--output", output]


def test_a_write_that_is_torn_leaves_the_old_model_and_nothing_else(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("llama3", shards=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    before = sha256((tmp_path / "merged/model.safetensors").read_bytes()).hexdigest()
    files = name_files(base, adapter, tmp_path / "merged")
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable, "-m", "lorasweep", *files]
    done = subprocess.run(limited, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert sha256((tmp_path / "merged/model.safetensors").read_bytes()).hexdigest() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "merged"]


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of 100 MB in matrices of more than one block, and an adapter for it."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    shapes = {"q_proj": (3001, 2048), "k_proj": (512, 2048), "down_proj": (2048, 3001), "up_proj": (8192, 2048)}
    write_base(folder / "base", {f"layers.{i}.{n}": torch.randn(s) * 0.02 for i in range(2) for n, s in shapes.items()})
    write_adapter(
        folder / "adapter",
        {
            f"layers.{i}.{n}": (torch.randn(64, s[1]), torch.randn(s[0], 64))
            for i in range(2)
            for n, s in shapes.items()
        },
        alpha=24,
        targets=list(shapes),
        rank=64,
    )
    return folder / "base", folder / "adapter"


def write_base(folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir()
    files = {f"{name}.weight": f"{name}.safetensors" for name in weights}
    for name, weight in weights.items():
        save_file({f"{name}.weight": weight.to(dtype)}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")


def write_adapter(
    folder: Path,
    weights: dict[str, tuple[torch.Tensor, torch.Tensor]],
    alpha: float,
    targets: list[str],
    rank: int,
    **more: Any,
) -> None:
    folder.mkdir()
    tensors = {f"base_model.model.{name}.lora_A.weight": a for name, (a, _) in weights.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": b for name, (_, b) in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, **more}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge_modules_with_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """PEFT on bare linear layers, which takes any shape."""
    model = torch.nn.Module()
    for name, weight in read_weights(base).items():
        parent = model
        *path, leaf = name.removesuffix(".weight").split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        linear.weight.data.copy_(weight)
        parent.add_module(leaf, linear)
    model.config = {"model_type": "custom"}
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_of_many_blocks_are_those_of_peft_on_any_number_of_threads(
    large: tuple[Path, Path], tmp_path: Path, threads: int
) -> None:
    base, adapter = large
    record = merge(base, adapter, tmp_path / "merged", threads=threads, verify=True)
    for file in (tmp_path / "merged").glob("*.safetensors"):
        assert record["sha256"][file.name] == sha256(file.read_bytes()).hexdigest()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peft = merge_modules_with_peft(base, adapter, torch.bfloat16)
    finally:
        torch.set_num_threads(before)
    assert find_differences(read_weights(tmp_path / "merged"), peft) == []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 300),
    # With few columns, other routines multiply a block than the whole: a real matrix has too few rows to be cut then.
    width=st.integers(16, 300),
    rank=st.integers(1, 40),
    alpha=st.sampled_from([0.1, 1, 7, 16, 48]),
    dtype=st.sampled_from(list(DTYPES.values())),
    adapter_dtype=st.sampled_from(list(DTYPES.values())),
    block=st.integers(1, 5000),
    rslora=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_rank_precision_and_block_gives_the_bits_of_peft(
    rows: int,
    width: int,
    rank: int,
    alpha: float,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    block: int,
    rslora: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        # Blocks of few rows occur only where matrices have few: a real one is of millions of values.
        patch.setattr(merge_module, "_BLOCK", max(block, 64 * width))
        write_base(folder / "base", {"one.layer": torch.randn(rows, width)}, dtype)
        a, b = torch.randn(rank, width).to(adapter_dtype), torch.randn(rows, rank).to(adapter_dtype)
        write_adapter(folder / "adapter", {"one.layer": (a, b)}, alpha, ["layer"], rank, use_rslora=rslora)
        merge(folder / "base", folder / "adapter", folder / "merged", verify=True)
        peft = merge_modules_with_peft(folder / "base", folder / "adapter", dtype)
        assert find_differences(read_weights(folder / "merged"), peft) == []


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_shard_cut_anywhere_or_with_a_spoilt_header_is_refused_or_whole(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_base(folder / "base", {"a.layer": torch.ones(3, 4), "b.layer": torch.ones(3, 4)})
        write_adapter(folder / "adapter", {"a.layer": (torch.ones(2, 4), torch.ones(3, 2))}, 1, ["a.layer"], rank=2)
        shard = folder / "base/b.layer.safetensors"
        content = bytearray(shard.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        header = 8 + int.from_bytes(content[:8], "little")
        if data.draw(st.booleans()):
            shard.write_bytes(content[:place])
        else:
            content[min(place, header - 1)] ^= 1 << data.draw(st.integers(0, 7))
            shard.write_bytes(content)
        try:
            merge(folder / "base", folder / "adapter", folder / "merged")
        except InputError:
            assert not (folder / "merged").exists()
        else:  # a flipped bit may leave a header that is as good
            assert read_weights(folder / "merged").keys() == read_weights(folder / "base").keys()
        assert not list(folder.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_merge_that_is_killed_leaves_nothing_that_looks_complete(
    large: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    base, adapter = large
    files = name_files(base, adapter, tmp_path / "merged")
    partial = tmp_path / ".merged.partial"
    cut_short = 0
    for _ in range(20):
        process = forked_evaluation.start("lorasweep", [*files, "--threads", "1"], ENVIRONMENT)
        while process.exitcode is None and not list(partial.glob("*.safetensors")):
            time.sleep(0.002)
        time.sleep(0.02 * cut_short)
        end = process.kill if number == signal.SIGKILL else process.terminate
        end()
        process.join()
        if (tmp_path / "merged").exists():
            assert read_checkpoint.__wrapped__(tmp_path / "merged")
            shutil.rmtree(tmp_path / "merged")
            continue
        assert not (partial / "config.json").exists()
        with pytest.raises(InputError, match=r"no config\.json|no such directory"):
            read_checkpoint.__wrapped__(partial)
        assert partial.exists() == (number == signal.SIGKILL)
        cut_short += 1
        if cut_short == 3:
            break
    assert cut_short == 3
    assert forked_evaluation.call("lorasweep", [*files, "--verify"], environment=ENVIRONMENT).returncode == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["merged"]


def test_tied_adapters_of_tied_matrices_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    adapter = make_adapter(make_base("qwen2"), tmp_path / "adapter", target_modules=["lm_head"])
    set_key("ensure_weight_tying", True)(adapter)
    with pytest.raises(AdapterError, match="ensure_weight_tying is set for an embedding that is the head"):
        merge(make_base("qwen2"), adapter, tmp_path / "merged")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_an_embedding_that_may_be_tied_to_something_else_is_refused(tmp_path: Path) -> None:
    write_base(tmp_path / "base", {"shared": torch.ones(5, 4), "layer": torch.ones(3, 4)})
    write_adapter(tmp_path / "adapter", {}, 1, ["shared"], rank=2)
    names = ("lora_embedding_A", (2, 5)), ("lora_embedding_B", (4, 2))
    tensors = {f"base_model.model.shared.{name}": torch.ones(shape) for name, shape in names}
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"changes shared.weight, but .* its tied weights are unknown"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_reading_an_adapter_draws_no_random_number(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Answers that are drawn with a seed do not depend on what was read before."""
    base = make_base("mistral")
    adapter = make_adapter(base, tmp_path / "adapter")
    before = torch.get_rng_state()
    read_adapter(adapter, read_checkpoint(base))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_that_began_with_eva_is_plain_lora(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama3")
    adapter = make_adapter(base, tmp_path / "adapter")
    set_key("init_lora_weights", "eva")(adapter)
    merge(base, adapter, tmp_path / "merged")
    assert find_differences(read_weights(tmp_path / "merged"), merge_with_peft(base, adapter, "bf16")) == []


@pytest.mark.parametrize("feature", ["DoRA", "bias: all", "lora_bias", "modules_to_save", "the embedding and the head"])
def test_every_kind_of_tensor_is_looked_for_where_peft_applies_it(
    make_base: Callable[..., Path], tmp_path: Path, feature: str
) -> None:
    family, settings = SAME_AS_PEFT[feature]
    base = make_base(family)
    adapter = read_adapter(make_adapter(base, tmp_path / "adapter", **settings), read_checkpoint(base))
    state = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter.path)).state_dict()
    assert check_injected(adapter, state, "default") == len(adapter.tensors)
    parts = ["lora_", "modules_to_save", *(["bias"] if "bias" in settings else [])]
    ours = [name for name in state if any(part in name for part in parts)]
    assert len(ours) >= len(adapter.tensors) - 2  # the bases of an embedding and a head are there as well
    for name in ours:
        with pytest.raises(AdapterError, match="1 tensors changed on loading"):
            check_injected(adapter, state | {name: state[name] + 1}, "default")
