"""The parts of a recipe are built without weights: what is right is no fault, and each fault is told by its part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.trainers.torchtune.building import find_faults
from plain_checkpoint import LLAMA3_ROPE, write_checkpoint
from recipes import write_recipe

FAMILIES = [
    {},
    {"rope_scaling": LLAMA3_ROPE},
    {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True},
    {"model_type": "mistral", "sliding_window": None},
]


@pytest.mark.parametrize("config", FAMILIES, ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_recipe_of_each_family_has_no_faults_but_its_broken_tokenizer(
    tmp_path: Path, config: dict[str, Any], dtype: str
) -> None:
    recipe = write_recipe(tmp_path, write_checkpoint(tmp_path / "model", **config), dtype=dtype)
    assert list(find_faults(recipe.read_text())) == ["tokenizer"]
    assert [file.name for file in recipe.parent.iterdir()] == ["recipe.yaml"]


GOOD = [
    {"optimizer": {"_component_": "torch.optim.SGD", "momentum": 0.9}},
    {"optimizer": {"_component_": "torchao.optim.AdamW8bit", "fused": None}},
    {"loss": {"_component_": "torch.nn.CrossEntropyLoss"}},
    {"model": {"_component_": "torchtune.models.llama3_2.lora_llama3_2_1b"}},
    {"profiler": {"enabled": True, "output_dir": "profile"}},
    {"collate_fn": "torchtune.data.padded_collate_sft"},
]


@pytest.mark.parametrize("override", GOOD, ids=str)
def test_what_can_be_built_is_no_fault(make: Callable[..., Path], override: dict[str, Any]) -> None:
    if "model" in override:  # a builder of a fixed size takes no sizes
        recipe = make(_override=override).read_text()
        assert set(find_faults(recipe)) <= {"model"}
    else:
        assert find_faults(make(_override=override).read_text()) == {}


BAD = [
    ({"optimizer": {"_component_": "torchao.optim.AdamW8bit"}}, "optimizer", "keyword argument 'fused'"),
    ({"optimizer": {"_component_": "torch.optim.Adamw"}}, "optimizer", "No module named 'torch.optim.Adamw'"),
    ({"optimizer": {"eps": -1.0}}, "optimizer", "Invalid epsilon value: -1.0"),
    ({"lr_scheduler": {"num_cycle": 1}}, "lr_scheduler", "num_cycle"),
    ({"loss": {"num_output_chunk": 4}}, "loss", "num_output_chunk"),
    ({"model": {"num_kv_heads": 3}}, "model", "num_kv_heads"),
    ({"model": {"lora_ranks": 3}}, "model", "lora_ranks"),
    ({"checkpointer": {"model_type": "LAMA3"}}, "checkpointer", "'LAMA3' is no model_type of torchtune's"),
    ({"checkpointer": {"safe": True}}, "checkpointer", "FullModelHFCheckpointer: got an unexpected"),
    ({"dataset": {"_component_": "my_data.load"}}, "dataset", "Are you sure that module 'my_data' is installed?"),
    ({"tokenizer": {"max_seq_length": 3}}, "tokenizer", "ChatTokenizer: got an unexpected keyword argument"),
    ({"metric_logger": {"_component_": "torchtune.training.metric_logging.Disk"}}, "metric_logger", "'Disk'"),
    ({"collate_fn": "torchtune.data.padded"}, "collate_fn", "'padded'"),
]


@pytest.mark.parametrize(("override", "part", "said"), BAD, ids=str)
def test_what_cannot_be_built_is_told_by_its_part(
    make: Callable[..., Path], override: dict[str, Any], part: str, said: str
) -> None:
    faults = find_faults(make(_override=override).read_text())
    assert list(faults) == [part]
    assert said in faults[part]
