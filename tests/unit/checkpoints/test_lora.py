"""Which modules get an adapter, by words, names and patterns, and what is said of those that match nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.checkpoints.architecture import get_architecture, guess
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.lora import count_lora_parameters, find_modules, list_adapter_tensors
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.experiment.sections import Controls
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"} | SIZES,
    "tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True} | SIZES,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300},
    "mixtral": {"model_type": "mixtral"} | SIZES,
    "llama4": {"model_type": "llama4_text", "num_local_experts": 4} | SIZES,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    models = {}
    for family, config in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        (folder / "config.json").write_text(json.dumps(config))
        models[family] = read_shape(folder)
    return models


def name_llama(*parts: str) -> list[str]:
    groups = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(MLP, "mlp")
    return [f"model.layers.{layer}.{groups[part]}.{part}" for layer in range(2) for part in parts]


FOUND: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {}, name_llama("q_proj", "v_proj")),
    ("llama", {"lora_attn_modules": ["output_proj"], "apply_lora_to_mlp": True}, name_llama("o_proj", *MLP)),
    ("llama", {"apply_lora_to_output": True}, [*name_llama("q_proj", "v_proj"), "lm_head"]),
    ("llama", {"lora_modules": "all-linear"}, name_llama(*ATTENTION, *MLP)),
    ("tied", {"lora_modules": "all-linear"}, name_llama(*ATTENTION, *MLP)),
    ("llama", {"lora_modules": ["lm_head", "embed_tokens"]}, ["lm_head", "model.embed_tokens"]),
    ("llama", {"lora_modules": ["self_attn.q_proj"]}, name_llama("q_proj")),
    ("llama", {"lora_modules": ["model.layers.1.mlp.up_proj"]}, ["model.layers.1.mlp.up_proj"]),
    ("llama", {"lora_modules": {"regex": r"model\.layers\.1\..*(q|up)_proj"}}, name_llama("q_proj", "up_proj")[2:]),
    ("llama", {"lora_modules": "all-linear", "modules_to_save": ["mlp"]}, name_llama(*ATTENTION)),
    ("gpt2", {"lora_modules": ["c_attn"]}, ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]),
    ("mixtral", {"lora_modules": ATTENTION}, name_llama(*ATTENTION)),
]


@pytest.mark.parametrize(("family", "keys", "modules"), FOUND)
def test_modules_are_found_by_words_names_and_patterns(
    models: dict[str, Checkpoint], family: str, keys: dict[str, Any], modules: list[str]
) -> None:
    assert find_modules(models[family], Controls(**keys)) == modules


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"lora_modules": ["q_proj", "c_attn"]},
        "controls.lora_modules: 'c_attn' matches no linear layer or embedding of this model. Expected: all-linear, a "
        "list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, embed_tokens, or a regex that "
        "matches whole names such as model.layers.0.self_attn.q_proj",
    ),
    ("llama", {"lora_modules": ["proj"]}, "controls.lora_modules: 'proj' matches no linear layer"),
    ("llama", {"lora_modules": {"regex": "q_proj"}}, "controls.lora_modules: 'q_proj' matches no linear layer"),
    (
        "mixtral",
        {"lora_modules": "all-linear"},
        "controls.lora_modules: 'all-linear' means parameters of experts that are no linear layers, and cannot get an "
        "adapter: gate_up_proj, down_proj (model.layers.0.mlp.experts.gate_up_proj, 4 in all). Expected: a list of "
        "q_proj, k_proj, v_proj, o_proj, lm_head, embed_tokens",
    ),
    (
        "mixtral",
        {"lora_modules": ["q_proj", "down_proj"]},
        "controls.lora_modules: 'down_proj' means parameters of experts",
    ),
    ("mixtral", {"lora_modules": ["experts"]}, "controls.lora_modules: 'experts' means parameters of experts"),
    ("mixtral", {"lora_modules": {"regex": ".*_proj"}}, "controls.lora_modules: '.*_proj' means parameters of experts"),
    ("llama4", {"lora_modules": ["down_proj"]}, "controls.lora_modules: 'down_proj' means parameters of experts"),
    (
        "gpt2",
        {},
        "controls.lora_attn_modules: 'q_proj' is no linear layer of this model. Expected: lora_modules with the "
        "model's own names: c_attn, c_proj, c_fc, lm_head, wte, wpe",
    ),
    ("mixtral", {"apply_lora_to_mlp": True}, "controls.apply_lora_to_mlp: 'gate_proj' is no linear layer"),
    (
        "tied",
        {"apply_lora_to_output": True},
        "controls.apply_lora_to_output: the head of this model is tied to the emb",
    ),
    (
        "llama",
        {"lora_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
        "controls.lora_modules: ['lm_head'] means",
    ),
]


@pytest.mark.parametrize(("family", "keys", "said"), REFUSED)
def test_what_can_get_no_adapter_is_refused_by_name(
    models: dict[str, Checkpoint], family: str, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as error:
        find_modules(models[family], Controls(**keys))
    assert str(error.value).startswith(said)


def test_a_module_to_save_that_is_not_there_is_refused(models: dict[str, Checkpoint]) -> None:
    with pytest.raises(
        InputError, match=r"controls.modules_to_save: 'head2' matches no module .*: embed_tokens, q_proj"
    ):
        list_adapter_tensors(models["llama"], Controls(modules_to_save=["head2"]))


def test_torchtunes_words_that_a_model_lacks_count_nothing(models: dict[str, Checkpoint]) -> None:
    """A trainer of one's own may read them in its own way."""
    assert count_lora_parameters(models["gpt2"], Controls()) == 0


def test_trained_parameters_are_counted(models: dict[str, Checkpoint]) -> None:
    def count(**keys: Any) -> int:
        return count_lora_parameters(models["llama"], Controls(lora_rank=4, **keys))

    plain = 2 * 4 * ((64 + 64) + (64 + 32))
    assert count() == count(init_lora_weights="pissa") == count(use_rslora=True) == plain
    assert count(use_dora=True) == plain + 2 * (64 + 32)
    assert count(modules_to_save=["lm_head"]) == plain + 64 * 300
    assert count(lora_modules=["embed_tokens"]) == 4 * (64 + 300)


def test_names_on_disk_say_the_same_of_a_model_as_transformers_does(tmp_path: Path) -> None:
    base = read_checkpoint(write_checkpoint(tmp_path / "known"))
    known, guessed = get_architecture(base), guess(base)
    for name in (
        "layers",
        "embeddings",
        "head",
        "tied",
        "fused",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "num_heads",
    ):
        assert getattr(known, name) == getattr(guessed, name), name


def test_a_model_that_transformers_does_not_know_is_planned_by_its_names_on_disk(tmp_path: Path) -> None:
    base = read_checkpoint(write_checkpoint(tmp_path / "own", model_type="own"))
    assert find_modules(base, Controls()) == [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    assert get_architecture(base).matrix_values == base.num_parameters - 32 * 8


def test_a_model_is_described_once_in_a_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "first/config.json").write_text(json.dumps(FAMILIES["llama"]))
    first = read_shape(tmp_path / "first")
    monkeypatch.setattr("lorasweep.checkpoints.architecture._build", None)
    (tmp_path / "first").rename(tmp_path / "moved")
    again = read_shape(tmp_path / "moved")
    assert get_architecture(again) == get_architecture(first)
    assert [*get_architecture(again).layers] == [*get_architecture(first).layers]


def test_without_the_evaluation_environment_only_weights_say_what_a_model_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorasweep.checkpoints.architecture._ROOT", tmp_path)
    base = read_checkpoint(write_checkpoint(tmp_path / "model"))
    assert get_architecture(base) == guess(base)
    (tmp_path / "model/model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"config.json': sizes need the evaluation environment.*Expected: make install"
    ):
        read_shape(tmp_path / "model")
