"""A model into which an adapter is merged in memory is bit for bit the merged checkpoint, and then the base again."""

# ruff: noqa: F811  a fixture is imported
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merge import DTYPES, SAME_AS_PEFT, TIED, make_adapter, make_base, read_weights  # noqa: F401
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MixtralConfig, Qwen2MoeConfig

from lorasweep.adapters import in_memory
from lorasweep.adapters.adapter import AdapterError, read_adapter
from lorasweep.adapters.in_memory import ModelInMemory
from lorasweep.adapters.merge import Source, merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.util.errors import InputError
from tiny_model import FAMILIES

FAMILIES["neox"] = (GPTNeoXConfig, {"intermediate_size": 64})
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES["mixtral"] = (MixtralConfig, {**EXPERTS, "tie_word_embeddings": True})
FAMILIES["qwen2_moe"] = (Qwen2MoeConfig, {**EXPERTS, "shared_expert_intermediate_size": 32})

MakeBase = Callable[..., Path]


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])


def find_different(model: Any, other: Any) -> list[str]:
    """Names of parameters and buffers that are not the same bits in two models."""
    held, expected = model.state_dict(), other.state_dict()
    assert held.keys() == expected.keys()
    return [n for n in held if held[n].dtype != expected[n].dtype or not torch.equal(held[n], expected[n])]


def are_tied(model: Any) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def check(base: Path, adapter: Path, folder: Path, dtype: str) -> None:
    """Check that a model in memory is the merged one, and then the base, and answers as they do."""
    model, plain = load(base, dtype), load(base, dtype)
    holder = ModelInMemory(model, read_checkpoint(base))
    read = read_adapter(adapter, read_checkpoint(base))
    merge(base, adapter, folder, dtype)
    merged = load(folder, dtype)
    assert holder.merge(read) == len(load_file(adapter / "adapter_model.safetensors"))
    assert find_different(model, merged) == []
    assert find_different(model, plain)
    assert are_tied(model) == are_tied(merged)
    tokens = torch.arange(40).view(4, 10) * 6
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, merged(tokens).logits)
    assert all(parameter.requires_grad for parameter in model.parameters())  # else torch multiplies in another way
    holder.restore()
    assert find_different(model, plain) == []
    assert are_tied(model) == are_tied(plain)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


PRECISIONS = [("bf16", "bf16"), ("fp32", "fp32"), ("bf16", "fp16"), ("fp32", "bf16")]


@pytest.mark.parametrize("feature", [*SAME_AS_PEFT, *TIED])
def test_every_feature_is_merged_in_memory_as_on_disk(
    make_base: MakeBase,
    tmp_path: Path,
    feature: str,
) -> None:
    family, settings = {**SAME_AS_PEFT, **TIED}[feature]
    adapter = make_adapter(make_base(family, "fp32"), tmp_path / "adapter", **settings)
    number = list({**SAME_AS_PEFT, **TIED}).index(feature)
    stored, dtype = PRECISIONS[number % len(PRECISIONS)]
    check(make_base(family, stored), adapter, tmp_path / "merged", dtype)


@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_precision_is_merged_in_memory_as_on_disk(
    make_base: MakeBase,
    tmp_path: Path,
    stored: str,
    dtype: str,
) -> None:
    base = make_base("qwen2", stored)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    check(base, adapter, tmp_path / "merged", dtype)


def write_adapter(base: Path, folder: Path, targets: list[str]) -> Path:
    """Write an adapter of the tensors in the base's files whose modules have these names, as PEFT before 0.18 did."""
    torch.manual_seed(0)
    tensors = {}
    for name, tensor in read_weights(base).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            out, width = tensor.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = 0.3 * torch.randn(4, width)
            tensors[f"base_model.model.{module}.lora_B.weight"] = 0.3 * torch.randn(out, 4)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("family", "targets"),
    [("mixtral", ["q_proj"]), ("qwen2_moe", ["v_proj", "shared_expert_gate"]), ("neox", ["dense"])],
)
def test_models_whose_tensors_transformers_renames_or_joins_are_merged_in_memory(
    make_base: MakeBase,
    tmp_path: Path,
    family: str,
    targets: list[str],
) -> None:
    base = make_base(family, "bf16")
    adapter = write_adapter(base, tmp_path / "adapter", targets)
    for dtype in ("bf16", "fp32"):
        check(base, adapter, tmp_path / dtype, dtype)


def test_a_change_to_a_tensor_that_is_no_parameter_is_refused_by_name(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama3", "bf16")
    read = read_adapter(make_adapter(base, tmp_path / "adapter"), read_checkpoint(base))
    model = load(base, "bf16")
    model.model.layers = model.model.layers[:2]
    with pytest.raises(AdapterError, match=r"changes model\.layers\.2\.\S+, which is no parameter of the loaded Llama"):
        ModelInMemory(model, read_checkpoint(base)).merge(read)


def test_adapters_of_different_parts_follow_each_other(make_base: MakeBase, tmp_path: Path) -> None:
    """Nothing of one is left in the next, whatever it untied, and tied matrices are one again when they can be."""
    base = make_base("qwen2", "bf16")
    model, holder = load(base, "bf16"), None
    kinds: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
        {"target_modules": ["k_proj"], "bias": "all"},
        {"target_modules": ["embed_tokens"]},
    ]
    merged = []
    for number, kind in enumerate(kinds):
        adapter = make_adapter(base, tmp_path / f"adapter{number}", **kind)
        merge(base, adapter, tmp_path / f"merged{number}", "bf16")
        merged.append((read_adapter(adapter, read_checkpoint(base)), load(tmp_path / f"merged{number}", "bf16")))
    holder = ModelInMemory(model, read_checkpoint(base))
    for number in (0, 1, 2, 3, 4, 2, 1, 4, 0, 3):
        adapter, expected = merged[number]
        holder.merge(adapter)
        assert find_different(model, expected) == []
        assert are_tied(model) == are_tied(expected)
    holder.restore()
    assert find_different(model, load(base, "bf16")) == []
    assert are_tied(model)


def test_a_merge_that_fails_leaves_the_base(
    make_base: MakeBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base("qwen2", "bf16")
    first, second = (
        read_adapter(make_adapter(base, tmp_path / name, target_modules=targets), read_checkpoint(base))
        for name, targets in {"first": ["q_proj", "lm_head"], "second": ["up_proj", "embed_tokens"]}.items()
    )
    model = load(base, "bf16")
    holder = ModelInMemory(model, read_checkpoint(base))
    holder.merge(first)
    compute = Source.compute

    def fail(self: Source, tensor: Any, out: Any = None) -> Any:
        for number, block in enumerate(compute(self, tensor, out)):
            yield block
            if tensor.name.startswith("model.layers.1") and tensor.update:
                raise InputError(f"{tensor.name}: block {number} failed")

    with monkeypatch.context() as patch:
        patch.setattr(Source, "compute", fail)
        with pytest.raises(InputError, match="failed"):
            holder.merge(second)
    assert find_different(model, load(base, "bf16")) == []
    assert are_tied(model)
    monkeypatch.setattr(in_memory, "make_plan", lambda *_: (_ for _ in ()).throw(AdapterError("refused")))
    with pytest.raises(AdapterError, match="refused"):
        holder.merge(first)
    assert find_different(model, load(base, "bf16")) == []


def test_an_overflow_in_fp16_is_refused_as_on_disk(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("llama3", "bf16")
    adapter = make_adapter(base, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    save_file({name: 3e6 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}, file)
    model = load(base, "fp16")
    with pytest.raises(InputError, match="not finite") as on_disk:
        merge(base, adapter, tmp_path / "merged", "fp16")
    with pytest.raises(InputError, match="not finite"):
        ModelInMemory(model, read_checkpoint(base)).merge(read_adapter(adapter, read_checkpoint(base)))
    assert "float16" in str(on_disk.value)
    assert find_different(model, load(base, "fp16")) == []


def test_a_base_that_overflows_in_fp16_is_refused_as_on_disk(make_base: MakeBase, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_base("qwen2", "fp32", shards=False), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter")
    with pytest.raises(InputError, match="not finite"):
        merge(base, adapter, tmp_path / "merged", "fp16")
    with pytest.raises(InputError, match=r"model\.norm\.weight has values that are not finite in torch\.float16"):
        ModelInMemory(load(base, "fp16"), read_checkpoint(base))
    ModelInMemory(load(base, "bf16"), read_checkpoint(base)).merge(read_adapter(adapter, read_checkpoint(base)))


def test_a_loaded_model_that_is_not_the_checkpoint_is_refused_before_it_is_changed(
    make_base: MakeBase,
    tmp_path: Path,
) -> None:
    base = make_base("llama3", "bf16")
    read = read_adapter(make_adapter(base, tmp_path / "adapter"), read_checkpoint(base))
    model = load(base, "bf16")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[5, 7] += 1
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight in memory differs"):
        ModelInMemory(model, read_checkpoint(base)).merge(read)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())


def test_a_parameter_that_changed_meanwhile_is_noticed_when_the_base_is_restored(
    make_base: MakeBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base("llama3", "bf16")
    model = load(base, "bf16")
    holder = ModelInMemory(model, read_checkpoint(base))
    holder.merge(read_adapter(make_adapter(base, tmp_path / "adapter"), read_checkpoint(base)))
    compute = Source.compute

    def spoil(self: Source, tensor: Any, out: Any = None) -> Any:
        for block, moved in compute(self, tensor, out):
            if out is not None and "layers.2.mlp.down_proj" in tensor.name:
                block[0] += 1
            yield block, moved

    monkeypatch.setattr(Source, "compute", spoil)
    with pytest.raises(InputError, match=r"layers\.2\.mlp\.down_proj\.weight in memory differs"):
        holder.restore()


def test_a_base_whose_files_change_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("mistral", "fp16")
    model = load(base, "fp16")
    holder = ModelInMemory(model, read_checkpoint(base))
    read = read_adapter(make_adapter(base, tmp_path / "adapter"), read_checkpoint(base))
    os.utime(next(base.glob("*.safetensors")), (1, 1))
    with pytest.raises(InputError, match="has changed since it was loaded"):
        holder.merge(read)
