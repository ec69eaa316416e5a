"""What a trainer promises where it keeps its best epoch: tests that those of each trainer inherit."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import recipes
from lorasweep.trainers.training_log import Row, read_log

EPOCHS, BEST, PATIENCE = 6, 3, 2
"""The validation loss falls to the best epoch, and rises from there."""

STEPS = 3
"""Steps an epoch."""

CONTROLS = {"epochs": EPOCHS, "batch_size": 1, "gradient_accumulation_steps": 4, "lora_dropout": 0.1, "lr": 3e-2}
KILLED = -9

Make = Callable[..., Path]


def read(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def log(recipe: Path) -> list[Row]:
    return [replace(row, seconds=0) for row in read_log(recipe.parent / "adapter/training_log.csv")]


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


class KeepsBestEpoch:
    """Subclasses have `trainer` and `train_and_end`, and the fixture `model` where they are."""

    trainer: str
    train_and_end: Callable[..., int]

    @pytest.fixture(scope="class")
    @classmethod
    def data(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        """Answers of one letter, and held-out answers of many, so that it is learnt in vain to end after the first."""
        folder = tmp_path_factory.mktemp("data")
        held_out = recipes.write_long_answers(folder / "held_out.jsonl")
        train = recipes.write_samples(folder / "train.jsonl", "abcdefghijklm")
        return {"train": str(train), "validation": str(held_out)}

    @pytest.fixture
    def make(self, model: Path, data: dict[str, Any], tmp_path: Path) -> Make:
        def make(point: str = "point", **settings: Any) -> Path:
            options = {"keeps_best_epoch": True, "data": data, **CONTROLS, **settings}
            return recipes.write_recipe(tmp_path, model, point, trainer=self.trainer, **options)

        return make

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, model: Path, data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A training that keeps all epochs, each by its number."""
        folder = tmp_path_factory.mktemp("plain")
        recipe = recipes.write_recipe(folder, model, trainer=cls.trainer, data=data, **CONTROLS)
        earlier = {epoch: recipe.parent / str(epoch) for epoch in range(1, EPOCHS)}
        assert cls.train_and_end(recipe, earlier=earlier) == 0, said(recipe)
        return recipe

    def check(self, recipe: Path, plain: Path, trained: int) -> None:
        """Check that a training of so many epochs has kept the best one, and the log of all of them."""
        assert read(recipe.parent / "adapter") == read(plain.parent / str(BEST))
        assert log(recipe) == log(plain)[: STEPS * trained]
        losses = {row.epoch: row.validation_loss for row in log(recipe) if row.validation_loss is not None}
        record, best = (
            json.loads((folder / "lorasweep.json").read_text())
            for folder in (recipe.parent / "adapter", plain.parent / str(BEST))
        )
        assert record["best_epoch"] == {
            "epoch": BEST,
            "validation_loss": min(losses.values()),
            "epochs_trained": len(losses),
        }
        assert len(losses) == trained
        for key in ("epochs", "steps", "tokens", "final_train_loss", "final_validation_loss", "adapter_sha256"):
            assert record[key] == best[key]
        assert "best_epoch" not in best

    def test_the_adapter_is_that_of_the_epoch_with_the_lowest_validation_loss(self, make: Make, plain: Path) -> None:
        recipe = make()
        assert self.train_and_end(recipe) == 0, said(recipe)
        self.check(recipe, plain, trained=EPOCHS)
        assert not list(recipe.parent.glob("epoch=*"))

    @pytest.mark.parametrize(
        ("happens", "step", "save_every", "goes_on_after"),
        [
            ("", 0, 1000, 0),
            ("told to stop", 14, 1000, 15),  # in the step that decides
            ("killed at the end of an epoch", 4, 4, 12),
            ("killed before it is published", 0, 15, 15),
            ("killed before it is published", 0, 4, 12),
            ("killed in a step", 10, 1, 10),  # between the best epoch and the decision
        ],
    )
    def test_it_stops_out_of_patience_and_so_does_one_that_was_interrupted_before_or_after_the_decision(
        self, make: Make, plain: Path, happens: str, step: int, save_every: int, goes_on_after: int
    ) -> None:
        recipe = make(patience=PATIENCE)
        if happens:
            assert self.train_and_end(recipe, save_every, happens, step) == (1 if happens == "told to stop" else KILLED)
            assert not (recipe.parent / "adapter").exists()
        assert self.train_and_end(recipe) == 0, said(recipe)
        self.check(recipe, plain, trained=BEST + PATIENCE)
        assert (f"Resuming after step {goes_on_after}," in said(recipe)) == (goes_on_after > 0)

    def test_one_that_stopped_early_is_done(self, make: Make) -> None:
        recipe = make(patience=1, epochs=EPOCHS)
        assert self.train_and_end(recipe) == 0, said(recipe)
        assert log(recipe)[-1].epoch == BEST + 1
        (recipe.parent / "adapter").rename(recipe.parent / "first")
        assert self.train_and_end(recipe, 1, "killed in a step", 0) == 0, said(recipe)
        assert "This recipe was trained by an earlier run" in said(recipe)
        assert read(recipe.parent / "adapter") == read(recipe.parent / "first")

    def test_other_epochs_beside_it_and_other_validation_data_than_the_recipes_are_refused(
        self, make: Make, data: dict[str, Any]
    ) -> None:
        recipe = make()
        assert self.train_and_end(recipe, earlier={1: recipe.parent / "first"}) == 1
        assert "keeps its best epoch alone, but epoch 1 is wanted too" in said(recipe)
        recipe.write_text(f"# validation data sha256: {'0' * 64}\n{recipe.read_text()}")
        assert self.train_and_end(recipe) == 1
        assert f"{data['validation']}: has changed since {recipe} was written" in said(recipe)
