"""A training by trl: what it leaves, and that one which is interrupted ends bit for bit as one that was not."""

import importlib
import json
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

import recipes
from interrupted_trl import train_and_end
from lorasweep.trainers.tokenizer import ChatTokenizer
from lorasweep.trainers.training_log import COLUMNS, Row, read_log
from lorasweep.util.digest import digest_file
from tiny_model import save_model

# Six steps an epoch, and one batch that is left over.
CONTROLS = {
    "epochs": 2,
    "batch_size": 1,
    "gradient_accumulation_steps": 4,
    "num_warmup_steps": 3,
    "lora_dropout": 0.1,
    "lr": 4e-3,
}
KILLED = -9

pytestmark = pytest.mark.long  # tests/e2e/test_trainers.py says so of the most of it

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    """Write the recipe of a point of a sweep."""

    def make(point: str = "point", **settings: Any) -> Path:
        return recipes.write_recipe(tmp_path, model, point, trainer="trl", **{**CONTROLS, **settings})

    return make


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    held_out = recipes.write_samples(folder / "validation.jsonl", "aceg")
    recipe = recipes.write_recipe(folder, model, trainer="trl", data={"validation": str(held_out)}, **CONTROLS)
    assert train_and_end(recipe, earlier={1: recipe.parent / "first"}) == 0, said(recipe)
    return recipe


@pytest.fixture
def recipe(undisturbed: Path, tmp_path: Path) -> Path:
    """The same recipe, in a point's folder of its own."""
    file = tmp_path / "sweep/trainings/point/recipe.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(undisturbed.read_text().replace(str(undisturbed.parent), str(file.parent)))
    return file


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


def read(recipe: Path) -> tuple[bytes, bytes | None, list[Row]]:
    """The weights after each epoch, and the log less its times."""
    first, last = recipe.parent / "first", recipe.parent / "adapter"
    rows = [replace(row, seconds=0) for row in read_log(last / "training_log.csv")]
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (first, last) if folder.is_dir()]
    return weights[-1], weights[0] if len(weights) > 1 else None, rows


def record(recipe: Path) -> dict[str, Any]:
    return dict(json.loads((recipe.parent / "adapter/lorasweep.json").read_text()))


def train(recipe: Path, *arguments: Any, **options: Any) -> None:
    assert train_and_end(recipe, *arguments, **options) == 0, said(recipe)


def end(recipe: Path) -> None:
    """Train to the end, with the adapter of the first epoch."""
    train(recipe, earlier={1: recipe.parent / "first"})


@pytest.mark.parametrize(
    ("happens", "step", "save_every", "goes_on_after"),
    [
        ("killed in a step", 5, 3, 3),
        ("killed before it is saved", 4, 2, 2),
        ("killed while a state is written", 3, 1, 2),
        ("killed at the end of an epoch", 1, 5, 10),
        pytest.param("killed in a step", 0, 1, 0, marks=pytest.mark.long),
        pytest.param("killed in a step", 6, 2, 6, marks=pytest.mark.long),
        pytest.param("killed while a state is written", 1, 1, 0, marks=pytest.mark.long),
        pytest.param("killed at the end of an epoch", 0, 6, 0, marks=pytest.mark.long),
        pytest.param("killed in a step", 9, 4, 8, marks=pytest.mark.long),
    ],
)
def test_a_killed_training_ends_as_if_it_had_not_been(
    undisturbed: Path, recipe: Path, happens: str, step: int, save_every: int, goes_on_after: int
) -> None:
    earlier = {1: recipe.parent / "first"}
    assert train_and_end(recipe, save_every, happens, step, earlier=earlier) == KILLED, said(recipe)
    assert not (recipe.parent / "adapter").exists()
    end(recipe)
    assert read(recipe) == read(undisturbed)
    assert (f"Resuming after step {goes_on_after}," in said(recipe)) == (goes_on_after > 0)
    assert not (recipe.parent / "state/train").exists()


@pytest.mark.parametrize("spoilt", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_torn_state_is_not_taken_but_the_one_before_it_or_none(undisturbed: Path, recipe: Path, spoilt: int) -> None:
    assert train_and_end(recipe, 1, "killed in a step", 8) == KILLED
    for file in sorted((recipe.parent / "state/train/saved").glob("step-*.pt"))[-spoilt:]:
        file.write_bytes(file.read_bytes()[:-1000])
    end(recipe)
    assert said(recipe).count("is damaged; it is not used") == spoilt
    assert ("Resuming after step 7," in said(recipe)) == (spoilt == 1)
    assert read(recipe) == read(undisturbed)


def test_where_epochs_end_early_it_goes_on_as_well(make: Make) -> None:
    whole, killed = (make(point, max_steps_per_epoch=4) for point in ("whole", "killed"))
    train(whole)
    for step in (3, 4, 6):
        assert train_and_end(killed, 1, "killed in a step", step) == KILLED
    train(killed)
    assert read(killed) == read(whole)
    assert [row.step for row in read(whole)[2]] == list(range(1, 9))


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa", "lora_dropout": 0.0},
        {"quantize": "nf4"},
        pytest.param({"use_dora": True, "loraplus_lr_ratio": 4, "optimizer": "adafactor"}, marks=pytest.mark.long),
        pytest.param({"dtype": "bf16", "enable_activation_checkpointing": True}, marks=pytest.mark.long),
        pytest.param(
            {"modules_to_save": ["lm_head"], "lora_modules": ["q_proj", "embed_tokens"]}, marks=pytest.mark.long
        ),
    ],
    ids=lambda settings: "_".join(map(str, next(iter(settings.items())))),
)
def test_each_kind_of_adapter_goes_on(make: Make, settings: dict[str, Any]) -> None:
    whole, killed = (make(point, epochs=1, **settings) for point in ("whole", "killed"))
    train(whole)
    assert train_and_end(killed, 2, "killed in a step", 3) == KILLED
    train(killed)
    assert "Resuming after step 2," in said(killed)
    assert read(killed) == read(whole)
    losses = [row.loss for row in read(whole)[2]]
    assert losses[-1] < losses[0]
    assert record(whole).get("quantize") == settings.get("quantize")


def test_it_saves_and_ends_when_it_is_told_to_and_its_loggers_get_the_logs_values(
    undisturbed: Path, recipe: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"metric_loggers": ["tensorboard"], "earlier": {1: recipe.parent / "first"}}
    assert train_and_end(recipe, 100, "told to stop", 7, **options) == 1
    assert "train: told to stop (SIGTERM); step 8 is saved, and the next run resumes from it" in said(recipe)
    train(recipe, 100, **options)
    assert "Resuming after step 8," in said(recipe)
    assert read(recipe) == read(undisturbed)
    events = EventAccumulator(str(recipe.parents[2] / "tensorboard/point"), size_guidance={"tensors": 0}).Reload()
    assert set(events.Tags()["tensors"]) == set(COLUMNS) - {"step"}
    for name in events.Tags()["tensors"]:
        seen = {event.step: float(event.tensor_proto.float_val[0]) for event in events.Tensors(name)}
        rows = read_log(recipe.parent / "adapter/training_log.csv")
        assert seen == pytest.approx({row.step: value for row in rows if (value := getattr(row, name)) is not None})


def test_mlflow_is_told_each_step_once(undisturbed: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = importlib.import_module("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    options: dict[str, Any] = {"metric_loggers": ["mlflow"], "earlier": {1: recipe.parent / "first"}}
    assert train_and_end(recipe, 100, "told to stop", 7, **options) == 1
    train(recipe, 100, **options)
    assert read(recipe) == read(undisturbed)
    client = tracking.MlflowClient(tracking_uri=(recipe.parents[2] / "mlflow/point").as_uri())
    [experiment] = client.search_experiments(filter_string="name = 'sweep'")
    [made] = client.search_runs([experiment.experiment_id])
    assert (made.info.run_name, made.info.status, made.data.params["lora.r"]) == ("point", "FINISHED", "8")
    for name in ("loss", "validation_loss"):
        told = [(metric.step, metric.value) for metric in client.get_metric_history(made.info.run_id, name)]
        assert told == [(row.step, value) for row in read(recipe)[2] if (value := getattr(row, name)) is not None]


def test_its_validation_loss_is_transformers_mean_over_the_answers_tokens(undisturbed: Path, model: Path) -> None:
    rows = read(undisturbed)[2]
    assert [row.step for row in rows if row.validation_loss is not None] == [6, 12]
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), undisturbed.parent / "adapter")
    tokenizer = ChatTokenizer(str(model)).tokenizer
    total, count = 0.0, 0
    for line in (undisturbed.parents[3] / "validation.jsonl").read_text().splitlines():
        sample = json.loads(line)
        messages = [{"role": "user", "content": sample["input"]}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        messages.append({"role": "assistant", "content": sample["output"]})
        tokens = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"]])
        with torch.inference_mode():
            logits = network(tokens).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, tokens[0, len(prompt) :], reduction="sum"))
        count += tokens.shape[1] - len(prompt)
    assert record(undisturbed)["final_validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_same_seed_gives_the_same_bytes_and_validation_changes_none(undisturbed: Path, make: Make) -> None:
    same, other = make("same"), make("other", seed=1)
    train(same)
    train(other)
    assert read(same)[0] == read(undisturbed)[0] != read(other)[0]


def test_a_recipe_has_each_argument_that_trl_has_another_default_of(make: Make) -> None:
    values = {}
    for kind in (TrainingArguments, SFTConfig):
        values[kind] = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    differing = {
        name for name, value in values[SFTConfig].items() if values[TrainingArguments].get(name, value) != value
    }
    assert {"learning_rate", "gradient_checkpointing"} <= differing
    recipe = yaml.safe_load(make().read_text())
    # Logs are lorasweep's own.
    assert differing - recipe["trl"].keys() == {"logging_steps"}


def test_the_effective_batch_stays_where_memory_runs_out(make: Make) -> None:
    # 25 samples: a quarter of a batch of 4 is left over where batches are of 1, and must not count.
    plain = {"lora_dropout": 0.0, "batch_size": 4, "gradient_accumulation_steps": 1}
    halved, whole = make("halved", **plain), make("whole", **plain)
    for _ in range(2):
        assert train_and_end(halved, 100, "out of memory", 1) == 1
    assert "train: CUDA out of memory; batch_size 4 is too large: the next attempt halves it" in said(halved)
    train(halved)
    train(whole)
    assert (record(halved)["batch_size_used"], record(halved)["steps"]) == (1, 12)
    ours, theirs = (read(recipe)[2] for recipe in (halved, whole))
    assert [row.loss for row in ours] == pytest.approx([row.loss for row in theirs], rel=1e-5)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]


def test_what_diverged_is_not_trained_again(make: Make) -> None:
    recipe = make(lr=1e30, num_warmup_steps=0)
    for _ in range(2):
        assert train_and_end(recipe) == 1
    assert "train: the training diverged: the loss of step 2 is" in said(recipe)
    assert "(in an earlier attempt; to try again, remove" in said(recipe)
    assert not (recipe.parent / "adapter").exists()


TWO: dict[str, Any] = {"batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0.0}


class TestTwoProcesses:
    def test_they_train_what_one_does_with_the_same_effective_batch(self, make: Make, tmp_path: Path) -> None:
        data = {"validation": str(recipes.write_samples(tmp_path / "validation.jsonl", "acegikm"))}
        two, one = (
            make("two", gpus=2, data=data, **TWO),
            make("one", data=data, **{**TWO, "batch_size": 4}),
        )
        train(two)
        train(one)
        theirs = load_file(one.parent / "adapter/adapter_model.safetensors")
        for name, tensor in load_file(two.parent / "adapter/adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)
        for row, other in zip(read(two)[2], read(one)[2], strict=True):
            assert (row.step, row.epoch, row.lr, row.tokens) == (other.step, other.epoch, other.lr, other.tokens)
            assert row.loss == pytest.approx(other.loss, rel=1e-4)
            assert (row.validation_loss is None) == (other.validation_loss is None)
            assert row.validation_loss is None or row.validation_loss == pytest.approx(other.validation_loss, rel=1e-4)

    def test_both_stop_out_of_patience(self, make: Make, tmp_path: Path) -> None:
        held_out = recipes.write_long_answers(tmp_path / "held_out.jsonl")
        data = {"validation": str(held_out)}
        recipe = make(gpus=2, keeps_best_epoch=True, data=data, **{**TWO, "patience": 1, "epochs": 9, "lr": 3e-2})
        assert train_and_end(recipe, 1000, "told to stop:1", 1) == 1
        train(recipe)
        losses = {row.epoch: row.validation_loss for row in read(recipe)[2] if row.validation_loss is not None}
        best = min(losses, key=losses.__getitem__)
        assert len(losses) == record(recipe)["best_epoch"]["epoch"] + 1 == best + 1 < 9

    @pytest.mark.parametrize("letters", [ascii_lowercase[:21], pytest.param("abcdefghijkl", marks=pytest.mark.long)])
    def test_one_that_is_told_to_stop_and_loses_a_process_goes_on_bit_for_bit(
        self, make: Make, tmp_path: Path, letters: str
    ) -> None:
        data = {"train": str(recipes.write_samples(tmp_path / "few.jsonl", letters))}
        settings = {**TWO, "gpus": 2, "lora_dropout": 0.1, "data": data}
        whole, recipe = make("whole", **settings), make("recipe", **settings)
        train(whole)
        assert train_and_end(recipe, 1000, "told to stop:1", 1) == 1
        assert "train: told to stop (SIGTERM); step 2 is saved, and the next run resumes from it" in said(recipe)
        assert train_and_end(recipe, 3, "killed in a step:1", 3) == 1
        assert "process 1 terminated with signal SIGKILL" in said(recipe)
        train(recipe)
        assert said(recipe).count("Resuming after step") == 2
        assert read(recipe) == read(whole)


def test_a_given_chat_template_writes_the_samples_and_stays_with_the_adapter(make: Make) -> None:
    file = make(epochs=1, batch_size=1, gradient_accumulation_steps=5, chat_template=recipes.GIVEN_TEMPLATE)
    train(file)
    assert record(file)["tokens"] == recipes.count_tokens_as_given(file.parents[3] / "train.jsonl")
    adapter = file.parent / "adapter"
    assert AutoTokenizer.from_pretrained(adapter).chat_template == recipes.GIVEN_TEMPLATE
    assert record(file)["chat_template_sha256"] == digest_file(adapter / "chat_template.jinja")
