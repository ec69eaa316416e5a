"""torchtune's recipe: derived from the checkpoint, overridden last, and refused where it would train another thing."""

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls, Data, Model
from lorasweep.trainers import TrainingSpec
from lorasweep.trainers.sections import dump_recipe
from lorasweep.trainers.torchtune.recipe import declared_adapter_only, recipe
from lorasweep.util.errors import InputError
from plain_checkpoint import LLAMA3_ROPE, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


def make(
    model: Path,
    override: dict[str, Any] | None = None,
    swept: tuple[str, ...] = (),
    data: Data = Data(train="train.jsonl"),  # noqa: B008
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    given: str | None = None,
    **controls: Any,
) -> dict[str, Any]:
    spec = TrainingSpec(
        checkpoint=read_checkpoint(model, given),
        controls=Controls(_override=override or {}, **controls),
        swept=swept,
        model=Model(path=str(model), device="cpu", dtype=dtype, chat_template=given and "own.jinja"),
        data=data,
        output_dir="results/x/point",
    )
    return dict(yaml.safe_load(recipe(spec)))


def test_controls_stand_where_torchtune_reads_them(model: Path) -> None:
    made = make(model, lora_rank=16, lr=1e-4, epochs=3, batch_size=4, seed=7, max_seq_len=512, num_warmup_steps=5)
    assert (made["model"]["lora_rank"], made["model"]["lora_alpha"]) == (16, 32)
    assert (made["optimizer"]["lr"], made["epochs"], made["batch_size"], made["seed"]) == (1e-4, 3, 4, 7)
    assert made["tokenizer"]["max_seq_len"] == 512
    assert made["lr_scheduler"]["num_warmup_steps"] == 5
    assert made["save_adapter_weights_only"] is True
    assert made["checkpointer"]["checkpoint_files"] == ["model-00000.safetensors", "model-00001.safetensors"]


def test_the_same_settings_give_the_same_text(model: Path) -> None:
    assert make(model, lr=1e-4) == make(model, lr=0.0001)


def test_the_dataset_is_read_by_our_own_component_as_the_section_says(model: Path) -> None:
    assert make(model, packed=True, max_seq_len=64)["dataset"] == {
        "_component_": "lorasweep.trainers.torchtune.dataset.training_data",
        "data_files": "train.jsonl",
        "format": "instruct",
        "column_map": {"input": "input", "output": "output"},
        "new_system_prompt": None,
        "train_on_input": False,
        "too_long": "error",
        "packed": True,
    }
    data = Data(train=("a", "b.csv"), validation="v", format="completion", text_column="body", max_samples=5)
    made = make(model, data=data.model_copy(update={"too_long": "drop"}))
    assert made["dataset"]["data_files"] == ["a", "b.csv"]
    assert made["dataset"]["column_map"] == {"text": "body"}
    assert made["dataset"]["too_long"] == made["dataset_val"]["too_long"] == "drop"
    assert (made["dataset"]["max_samples"], "max_samples" in made["dataset_val"]) == (5, False)
    assert made["dataset_val"]["data_files"] == "v"


def test_packs_beyond_the_models_context_are_refused(model: Path) -> None:
    with pytest.raises(InputError, match=r"^controls\.max_seq_len: 9000 is invalid with packed: true.*at most 8192"):
        make(model, packed=True, max_seq_len=9000)
    make(model, packed=True, max_seq_len=9000, override={"model": {"max_seq_len": 9000}})
    make(model, max_seq_len=9000)


def test_the_date_stands_in_the_recipe_where_the_template_writes_one(model: Path, tmp_path: Path) -> None:
    day = Data(train="t", template_date="2025-01-31")
    assert make(model, data=day) == make(model, data=Data(train="t"))
    dated = write_checkpoint(tmp_path / "dated")
    (dated / "chat_template.jinja").write_text('{{ strftime_now("%d %b %Y") }}{{ messages }}')
    assert make(dated)["tokenizer"]["template_date"] == "2024-07-26"
    assert make(dated, data=day)["tokenizer"]["template_date"] == "2025-01-31"
    assert "template_date" not in make(dated, data=Data(train="t", format="completion"))["tokenizer"]
    (dated / "chat_template.jinja").write_text("{{ strftime_now(form) }}")
    read_checkpoint.cache_clear()
    with pytest.raises(InputError, match=r"^model\.path: data\.template_date cannot fix"):
        make(dated)


def test_a_prompt_stands_in_the_recipe_where_there_is_one(model: Path) -> None:
    assert make(model, data=Data(train="t", prompt="Say {input}"))["tokenizer"]["prompt_template"] == "Say {input}"
    assert "prompt_template" not in make(model, data=Data(train="t", prompt="{input}"))["tokenizer"]


def test_the_text_of_a_given_template_stands_in_the_recipe(model: Path) -> None:
    text = "{% for m in messages %}\n{{ m['content'] | trim }}: \"ü\"\\n\t{% endfor %}\n"
    assert make(model, given=text)["tokenizer"]["chat_template"] == text
    assert "chat_template" not in make(model)["tokenizer"]
    assert make(model, given='{{ strftime_now("%Y") }}')["tokenizer"]["template_date"] == "2024-07-26"
    with pytest.raises(InputError, match=r"^model\.chat_template: data\.template_date cannot fix"):
        make(model, given="{{ strftime_now(form) }}")
    with pytest.raises(InputError, match=r"^model\.chat_template: 'own\.jinja' has '\$\{', which torchtune's recipes"):
        make(model, given="cost: ${ {{ messages }}")


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("data.system_prompt", {"system_prompt": "Write ${seed} as it is"}),
        ("data.prompt", {"prompt": "${input} {input}"}),
        ("data.format and the columns under data", {"input_column": "${i}"}),
    ],
)
def test_a_text_that_torchtune_would_replace_is_refused(model: Path, key: str, data: dict[str, Any]) -> None:
    expected = rf"^{key}: '.*\$\{{.*' has '\$\{{', which torchtune's recipes would replace.*or trainer: trl"
    for override in ({}, {"lr_scheduler": {"num_cycles": 1}}):
        with pytest.raises(InputError, match=expected):
            make(model, data=Data(**{"train": "t", **data}), override=override)


class TestOverride:
    def test_a_reference_that_is_escaped_is_refused(self, model: Path) -> None:
        with pytest.raises(InputError, match=r"^controls\._override\.a\.b: '\$\{lr\}' has '\$\{', which torchtune's"):
            make(model, override={"a": {"b": "\\${lr}"}})

    def test_it_is_merged_last_and_interpolated_by_recipe_and_controls(self, model: Path) -> None:
        override = {"optimizer": {"foreach": True, "eps": "${optimizer.lr}"}, "log_every_n_steps": "${lora_rank}"}
        override["note"] = "${controls.lora_alpha}"
        made = make(model, override, lr=1e-3, lora_rank=4)
        assert made["note"] == 8
        assert "controls" not in made
        assert made["optimizer"]["foreach"] is True
        assert made["optimizer"]["eps"] == 1e-3
        assert made["log_every_n_steps"] == 4

    def test_the_order_of_its_keys_makes_no_other_recipe(self, model: Path) -> None:
        one = {"a": {"x": 1, "y": 2}, "b": 3}
        other = {"b": 3, "a": {"y": 2, "x": 1}}
        assert yaml.safe_dump(make(model, one), sort_keys=False) == yaml.safe_dump(make(model, other), sort_keys=False)

    def test_the_founding_documents_examples_are_accepted(self, model: Path) -> None:
        full = {
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": "${output_dir}/checkpoints",
                "output_dir": "${output_dir}/hf_model",
            }
        }
        adapter = {"checkpointer": {**full["checkpointer"], "output_dir": "${output_dir}/adapter"}}
        adapter["checkpointer"]["save_adapter_weights_only"] = True
        assert make(model, full) == make(model, adapter) == make(model)

    def test_null_removes_a_key_of_a_section_and_is_a_value_outside_of_sections(self, model: Path) -> None:
        override = {
            "optimizer": {"fused": None},
            "profiler": {"schedule": {"wait_steps": None, "active_steps": 1}},
            "log_level": None,
        }
        made = make(model, override, lr=1e-3)
        assert made["optimizer"] == {"_component_": "torch.optim.AdamW", "weight_decay": 0.01, "lr": 1e-3}
        assert made["profiler"]["schedule"] == {"active_steps": 1}
        assert made["log_level"] is None
        assert make(model)["tokenizer"]["max_seq_len"] is None

    def test_null_removes_what_another_component_of_a_section_does_not_take(self, model: Path) -> None:
        own = {"_component_": "my_data.load", "format": None, "column_map": None, "too_long": None}
        made = make(model, {"dataset": {**own, "new_system_prompt": None, "train_on_input": None, "packed": None}})
        assert made["dataset"] == {"_component_": "my_data.load", "data_files": "train.jsonl"}
        plain = {"_component_": "my_optimizers.Plain", "fused": None, "weight_decay": None}
        assert make(model, {"optimizer": plain})["optimizer"] == {"_component_": "my_optimizers.Plain", "lr": 3e-4}
        with pytest.raises(InputError, match=r"dataset\.data_files: None is invalid: this is set by data\.train"):
            make(model, {"dataset": {**own, "data_files": None}})

    def test_null_removes_nothing_that_the_workflow_or_a_variable_sets(self, model: Path) -> None:
        as_none = {"checkpointer": {"recipe_checkpoint": None}, "tokenizer": {"prompt_template": None}}
        assert make(model, as_none) == make(model)
        for section, key in (("tokenizer", "path"), ("dataset", "data_files"), ("checkpointer", "checkpoint_files")):
            with pytest.raises(InputError, match=rf"_override\.{section}\.{key}: None is invalid: this is set by"):
                make(model, {section: {key: None}})
        with pytest.raises(InputError, match=r"prompt_template: None is invalid: this is set by data\.prompt"):
            make(model, as_none, data=Data(train="t", prompt="Say {input}"))
        with pytest.raises(InputError, match="None contradicts the variable 'lr'"):
            make(model, {"optimizer": {"lr": None}}, swept=("lr",))

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            ({"seed": 7}, "seed: 7 is invalid: this is set by controls.seed, which is 0. Expected: no seed in"),
            ({"seed": None}, "seed: None is invalid"),
            ({"batch_size": 64}, " in the override, and controls.batch_size: 64"),
            ({"epochs": 5}, "epochs: 5 is invalid"),
            ({"clip_grad_norm": 1.0}, "clip_grad_norm: 1.0 is invalid: this is set by controls.clip_grad_norm"),
            ({"model": {"lora_alpha": 64}}, "model.lora_alpha: 64 is invalid: this is set by controls.lora_alpha"),
            (
                {"model": {"_component_": "my.builder", "lora_alpha": None}},
                "Expected: no model.lora_alpha in",
            ),
            ({"model": {"lora_alpha": "${lora_rank}"}}, " in the override, and controls.lora_alpha: 8"),
            ({"optimizer": {"lr": "1e-3"}}, "optimizer.lr: '1e-3' is invalid: this is set by controls.lr"),
            ({"optimizer": {"weight_decay": None}}, "optimizer.weight_decay: None is invalid"),
            ({"tokenizer": {"max_seq_len": 64}}, " in the override, and controls.max_seq_len: 64"),
            ({"dataset": {"packed": True}}, " in the override, and controls.packed: True"),
        ],
    )
    def test_what_a_control_sets_cannot_be_overridden_since_the_table_has_the_control(
        self, model: Path, override: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(InputError) as error:
            make(model, override)
        assert said in str(error.value)

    def test_the_value_of_a_control_may_be_said_again(self, model: Path) -> None:
        said = {"optimizer": {"lr": "3e-4", "weight_decay": 0.01}, "model": {"lora_alpha": 16}, "batch_size": 2}
        made = make(model, said)
        assert {**made, "optimizer": {**made["optimizer"], "lr": 3e-4}} == make(model)
        assert make(model, {"model": {"lora_rank": "${lora_rank}"}}, swept=("lora_rank",), lora_rank=4)

    def test_what_the_workflow_does_anyway_may_be_said(self, model: Path) -> None:
        said = {"model": {"use_dora": False}, "resume_from_checkpoint": False, "dtype": "bf16", "device": "cpu"}
        assert make(model, said) == make(model)

    def test_where_adapters_alone_are_asked_for_is_found_in_both_places(self) -> None:
        assert declared_adapter_only({}) is None
        assert declared_adapter_only({"save_adapter_weights_only": False}) is False
        assert declared_adapter_only({"checkpointer": {"save_adapter_weights_only": True}}) is True

    @pytest.mark.parametrize(
        ("override", "said"),
        [
            (
                {"checkpointer": {"checkpoint_dir": "elsewhere"}},
                ["checkpointer.checkpoint_dir", "'elsewhere'", "model"],
            ),
            ({"output_dir": "elsewhere"}, ["output_dir", "'elsewhere'", "experiment.name"]),
            ({"resume_from_checkpoint": True}, ["resume_from_checkpoint", "True"]),
            ({"tokenizer": {"path": "elsewhere"}}, ["tokenizer.path", "'elsewhere'", "model.path"]),
            ({"tokenizer": {"prompt_template": "x"}}, ["tokenizer.prompt_template", "data.prompt"]),
            ({"dataset": {"new_system_prompt": "x"}}, ["dataset.new_system_prompt", "data.system_prompt"]),
            ({"dataset": {"data_files": "x"}}, ["dataset.data_files", "data.train"]),
            ({"dataset": {"max_samples": 1}}, ["dataset.max_samples", "data.max_samples"]),
            ({"dataset_val": {"too_long": "drop"}}, ["dataset_val.too_long", "data.too_long"]),
            ({"model": {"use_dora": True}}, ["model.use_dora", "True", "plain LoRA"]),
            ({"tokenizer": {"chat_template": "a"}}, ["tokenizer.chat_template", "set by model.chat_template"]),
            ({"note": "${"}, ["_override"]),
            ({"dtype": "fp16"}, ["dtype", "'fp16'", "model.dtype"]),
            ({"lora_rank": 4}, ["_override.lora_rank", "controls.lora_rank", "model.lora_rank"]),
            ({"optimizer": "adamw"}, ["_override.optimizer", "'adamw'", "a mapping"]),
            ({"optimizer": {"lr": "${no.such}"}}, ["_override", "no.such"]),
        ],
    )
    def test_what_the_workflow_decides_cannot_be_overridden(
        self, model: Path, override: dict[str, Any], said: list[str]
    ) -> None:
        with pytest.raises(InputError) as error:
            make(model, override)
        for part in said:
            assert part in str(error.value)

    def test_a_variable_cannot_be_overridden_since_every_point_would_be_the_same(self, model: Path) -> None:
        with pytest.raises(InputError, match="contradicts the variable 'lora_rank'"):
            make(model, {"model": {"lora_rank": 4}}, swept=("lora_rank",), lora_rank=8)

    @pytest.mark.parametrize("said", ["yes", 1])
    def test_what_is_neither_true_nor_false_is_refused(self, said: object) -> None:
        with pytest.raises(InputError, match="Expected: true or false"):
            declared_adapter_only({"save_adapter_weights_only": said})

    def test_true_and_false_at_once_are_refused(self) -> None:
        both = {"save_adapter_weights_only": True, "checkpointer": {"save_adapter_weights_only": False}}
        with pytest.raises(InputError, match="both true and false"):
            declared_adapter_only(both)


BUILDERS = [
    ({}, {}, "llama3.lora_llama3", "LLAMA3"),
    ({"rope_scaling": LLAMA3_ROPE}, {}, "llama3_1.lora_llama3_1", "LLAMA3"),
    ({"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}, {}, "llama3_2.lora_llama3_2", "LLAMA3_2"),
    ({"tie_word_embeddings": True}, {}, "llama3_2.lora_llama3_2", "LLAMA3_2"),
    ({"model_type": "mistral", "sliding_window": None}, {}, "mistral.lora_mistral", "MISTRAL"),
    ({"model_type": "qwen2"}, {"biases": True}, "qwen2.lora_qwen2", "QWEN2"),
]


@pytest.mark.parametrize(("config", "weights", "component", "model_type"), BUILDERS)
def test_the_builder_follows_from_the_configuration(
    tmp_path: Path, config: dict[str, Any], weights: dict[str, Any], component: str, model_type: str
) -> None:
    made = make(write_checkpoint(tmp_path / "model", **weights, **config))
    assert made["model"]["_component_"] == f"torchtune.models.{component}"
    assert made["checkpointer"]["model_type"] == model_type


def test_plain_rope_with_tied_embeddings_is_not_scaled_by_the_builders_default(tmp_path: Path) -> None:
    assert make(write_checkpoint(tmp_path / "model", tie_word_embeddings=True))["model"]["scale_factor"] == 1


REFUSED = [
    ({"model_type": "gemma2"}, {}, "model_type 'gemma2'"),
    ({"model_type": "phi3"}, {}, "model_type 'phi3'"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}, "RoPE of type 'yarn'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "RoPE of type 'linear'"),
    ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 2.0}}, {}, "RoPE with low_freq_factor 2.0"),
    ({"quantization_config": {"bits": 4}}, {}, "quantization_config"),
    ({"rms_norm_eps": None}, {}, "no rms_norm_eps in config.json"),
    ({"attention_bias": True}, {}, "attention_bias true"),
    ({"head_dim": 16}, {}, "head_dim 16"),
    ({"hidden_act": "gelu"}, {}, "hidden_act 'gelu'"),
    ({}, {"biases": True}, "with biases in attention"),
    ({"model_type": "qwen2"}, {}, "without biases in attention"),
    ({"model_type": "mistral", "sliding_window": 4096}, {}, "a sliding window of 4096 tokens"),
]


@pytest.mark.parametrize(("config", "weights", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_a_model_that_no_builder_makes_is_refused_with_those_that_are_known(
    tmp_path: Path, config: dict[str, Any], weights: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError) as error:
        make(write_checkpoint(tmp_path / "model", **weights, **config))
    for part in (said, "Llama 2, 3, 3.1 and 3.2", "Qwen2.5", "Mistral", "_override.model"):
        assert part in str(error.value)


def test_an_expert_can_name_the_builder(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", model_type="gemma2")
    override = {
        "model": {"_component_": "torchtune.models.gemma2.lora_gemma2_2b"},
        "checkpointer": {"model_type": "GEMMA2"},
    }
    made = make(model, override, lora_rank=4)
    # No builder of Gemma's takes this one.
    override["model"]["apply_lora_to_output"] = None
    assert set(made["model"]) - set(make(model, override, lora_rank=4)["model"]) == {"apply_lora_to_output"}
    with pytest.raises(InputError, match=r"apply_lora_to_mlp: None is invalid: this is set by controls"):
        make(model, {**override, "model": {**override["model"], "apply_lora_to_mlp": None}}, apply_lora_to_mlp=True)
    assert made["model"]["_component_"] == "torchtune.models.gemma2.lora_gemma2_2b"
    assert made["model"]["lora_rank"] == 4
    assert made["checkpointer"]["model_type"] == "GEMMA2"


def test_an_experts_builder_without_a_model_type_is_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", model_type="gemma2")
    with pytest.raises(InputError, match=r"checkpointer\.model_type is missing"):
        make(model, {"model": {"_component_": "torchtune.models.gemma2.lora_gemma2_2b"}})


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(InputError, match="apply_lora_to_output: true is invalid"):
        make(model, apply_lora_to_output=True)


def test_packing_without_a_length_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match=r"packed: true is invalid without max_seq_len"):
        make(model, packed=True)


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=150) | st.text(
    "ab :#'\"\\\n\x85-{", max_size=150
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text("abN_", min_size=1), children, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1), VALUES, min_size=1, max_size=3))
def test_a_recipes_text_is_pyyamls_own_whatever_stands_in_it(recipe: dict[str, Any]) -> None:
    assert dump_recipe(recipe) == yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=120)


def test_several_gpus_are_so_many_processes_of_the_distributed_recipe_and_one_is_said_nowhere(model: Path) -> None:
    assert make(model, gpus=2)["nproc_per_node"] == 2
    assert "nproc_per_node" not in make(model)
    # Where it varies one is among its values.
    assert make(model, gpus=1, swept=("gpus",)) == make(model)
    assert make(model, gpus=2, swept=("gpus",)) == make(model, gpus=2)
    with pytest.raises(InputError, match=r"_override\.nproc_per_node: 3 is invalid: this is set by controls\.gpus"):
        make(model, {"nproc_per_node": 3}, gpus=2)


def test_a_training_in_fp16_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match=r"model\.dtype: 'fp16' is invalid: torchtune does not train in fp16"):
        make(model, dtype="fp16")
