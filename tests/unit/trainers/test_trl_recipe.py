"""The recipe of a training by trl: every setting is in it once, and what cannot be trained with is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls, Data, Model
from lorasweep.trainers import TrainingSpec, get_trainer
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')
    model = write_checkpoint(tmp_path / "model")

    def make(
        dtype: str = "bf16", quantize: str | None = None, data: dict[str, Any] | None = None, **controls: Any
    ) -> str:
        spec = TrainingSpec(
            checkpoint=read_checkpoint(model),
            controls=Controls(**controls),
            swept=(),
            model=Model(path=str(model), dtype=dtype, device="cpu", quantize=quantize),
            data=Data(**{"train": str(tmp_path / "train.jsonl"), **(data or {})}),
            output_dir="results/sweep/trainings/point",
        )
        return get_trainer("trl").recipe(spec)

    return make


def read(recipe: str) -> Any:
    return yaml.safe_load(recipe)


def test_controls_are_arguments_of_trl_and_peft(make: Make) -> None:
    recipe = read(
        make(
            epochs=3,
            batch_size=4,
            gradient_accumulation_steps=5,
            lr=1e-4,
            optimizer="paged_adamw_8bit",
            schedule="constant",
            warmup_ratio=0.1,
            clip_grad_norm=0.5,
            lora_rank=16,
            lora_alpha="r",
            use_rslora=True,
            use_dora=True,
            loraplus_lr_ratio=16,
            init_lora_weights="gaussian",
            lora_modules="all-linear",
            modules_to_save=["lm_head"],
            seed=7,
            enable_activation_checkpointing=True,
        )
    )
    assert recipe["lora"] == {
        "r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "modules_to_save": ["lm_head"],
        "bias": "none",
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "gaussian",
    }
    assert recipe["loraplus_lr_ratio"] == 16
    expected = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 5,
        "learning_rate": 1e-4,
        "optim": "paged_adamw_8bit",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 0.1,
        "max_grad_norm": 0.5,
        "seed": 7,
        "gradient_checkpointing": True,
        "bf16": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    assert expected.items() <= recipe["trl"].items()


@pytest.mark.parametrize(
    ("controls", "modules"),
    [
        ({}, ["q_proj", "v_proj"]),
        (
            {"lora_attn_modules": ["k_proj", "output_proj"], "apply_lora_to_mlp": True},
            ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ),
        ({"lora_modules": ["down_proj"]}, ["down_proj"]),
        ({"lora_modules": {"regex": r"model\.layers\.0\..*_proj"}}, r"model\.layers\.0\..*_proj"),
    ],
)
def test_torchtunes_words_are_translated_and_the_models_own_are_taken(
    make: Make, controls: dict[str, Any], modules: Any
) -> None:
    assert read(make(**controls))["lora"]["target_modules"] == modules


def test_what_does_not_vary_from_the_default_is_left_out_or_said(make: Make) -> None:
    recipe = read(make())
    assert {"loraplus_lr_ratio", "processes", "dataset_val", "initial_adapter"}.isdisjoint(recipe)
    assert "quantize" not in recipe["model"]
    assert recipe["lora"]["lora_alpha"] == 16
    assert (recipe["trl"]["warmup_steps"], recipe["trl"]["max_grad_norm"]) == (0, 0.0)
    assert read(make(quantize="nf4"))["model"]["quantize"] == "nf4"
    assert read(make(gpus=2))["processes"] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "fp16"}, "model.dtype: 'fp16' is invalid"),
        ({"packed": True, "max_seq_len": 10}, "controls.packed: true is invalid with trainer: trl"),
        ({"apply_lora_to_output": True}, "controls.apply_lora_to_output: true is invalid with trainer: trl"),
        (
            {"warmup_ratio": 0.1, "num_warmup_steps": 2},
            "controls.warmup_ratio: 0.1 is invalid beside num_warmup_steps: 2",
        ),
        ({"init_lora_weights": "pissa", "quantize": "nf4"}, "is invalid with model.quantize: nf4"),
        ({"init_lora_weights": "olora", "use_dora": True}, "is invalid with controls.use_dora: True"),
        (
            {"_override": {"learning_rate": 1}},
            "controls._override.learning_rate: 1 is invalid: this is set by controls.lr",
        ),
        (
            {"_override": {"eos_token": "<end>"}},
            "controls._override.eos_token: '<end>' is invalid: this is set by the chat template",
        ),
        (
            {"_override": {"chat_template_path": "own.jinja"}},
            "controls._override.chat_template_path: 'own.jinja' is invalid: this is set by model.chat_template",
        ),
        (
            {"_override": {"lora_rank": 1}},
            "controls._override.lora_rank: trl has no such argument. Expected: controls.lora_rank",
        ),
        (
            {"_override": {"initial_adapter": "none"}},
            "controls._override.initial_adapter: no adapter_config.json in 'none'",
        ),
        ({"lora_modules": ["qkv"]}, "controls.lora_modules: 'qkv'"),
        (
            {"lora_modules": ["q_proj", "embed_tokens"], "loraplus_lr_ratio": 16},
            "controls.loraplus_lr_ratio: 16.0 is invalid with an adapter on the embedding model.embed_tokens",
        ),
    ],
)
def test_what_cannot_be_trained_with_is_refused(make: Make, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        make(**settings)
    assert message in str(refused.value)


def test_an_override_is_of_trls_arguments(make: Make) -> None:
    plain = read(make())["trl"]
    assert make(_override={"bf16": plain["bf16"], "weight_decay": plain["weight_decay"]}) == make()
    with pytest.raises(InputError, match="shuffle_dataset: True is invalid"):
        make(_override={"shuffle_dataset": True})
    assert read(make(_override={"adam_beta2": 0.95}))["trl"]["adam_beta2"] == 0.95


def test_a_number_of_an_override_is_a_number_without_a_dot_too(make: Make) -> None:
    override = {"adam_epsilon": "1e-7", "lr_scheduler_kwargs": {"rates": ["5e-1", "a"]}, "optim_args": "eps=1e-7"}
    made = read(make(_override=override))["trl"]
    assert made["adam_epsilon"] == 1e-7
    assert (made["lr_scheduler_kwargs"], made["optim_args"]) == ({"rates": [0.5, "a"]}, "eps=1e-7")


def test_an_override_is_interpolated_by_arguments_and_controls(make: Make) -> None:
    override = {"adam_epsilon": "${lr}", "neftune_noise_alpha": "${controls.lora_alpha}", "data_seed": "${adam_beta1}"}
    made = read(make(lr=1e-3, lora_rank=4, _override=override))["trl"]
    assert (made["adam_epsilon"], made["neftune_noise_alpha"], made["data_seed"]) == (1e-3, 8, 0.9)
    assert made.keys() == read(make())["trl"].keys() | override.keys()
    with pytest.raises(InputError, match=r"controls\._override\..*: Interpolation key 'no\.such' not found"):
        make(_override={"adam_epsilon": "${no.such}"})
