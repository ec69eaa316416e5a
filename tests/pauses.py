"""What a trainer promises where it can pause: tests that those of each trainer inherit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import pytest

import recipes
from lorasweep.trainers.training_log import Row, read_log

EPOCHS, STEPS = 3, 6
"""Epochs, and steps of each; one batch of an epoch is left over."""

CONTROLS = {"epochs": EPOCHS, "batch_size": 1, "gradient_accumulation_steps": 4, "lora_dropout": 0.1}
KILLED = -9


def read(adapter: Path) -> tuple[bytes, list[Row]]:
    """The weights, and the log less its times."""
    rows = [replace(row, seconds=0) for row in read_log(adapter / "training_log.csv")]
    return (adapter / "adapter_model.safetensors").read_bytes(), rows


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


class Pauses:
    """Subclasses have `trainer` and `train_and_end`, and the fixture `model` where they are."""

    trainer: str
    train_and_end: Callable[..., int]

    @classmethod
    def write(cls, folder: Path, model: Path) -> Path:
        held_out = recipes.write_samples(folder / "held_out.jsonl", "aceg")
        data = {
            "train": str(recipes.write_samples(folder / "train.jsonl", ascii_lowercase)),
            "validation": str(held_out),
        }
        return recipes.write_recipe(folder, model, trainer=cls.trainer, data=data, **CONTROLS)

    @pytest.fixture(scope="class")
    @classmethod
    def plain(cls, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A training without pauses, which keeps all epochs."""
        recipe = cls.write(tmp_path_factory.mktemp("plain"), model)
        earlier = {epoch: recipe.parent / f"epoch={epoch}" for epoch in range(1, EPOCHS)}
        assert cls.train_and_end(recipe, 1000, earlier=earlier) == 0, said(recipe)
        return recipe

    @pytest.fixture
    def recipe(self, model: Path, tmp_path: Path) -> Path:
        return self.write(tmp_path, model)

    def check_part(self, recipe: Path, plain: Path, until: int) -> None:
        assert read(recipe.parent / "adapter") == read(plain.parent / f"epoch={until}")
        assert list((recipe.parent / "state/train/saved").glob("step-*.pt"))

    def test_it_ends_as_a_training_without_pauses_and_has_its_epochs_adapters(self, plain: Path, recipe: Path) -> None:
        note = recipe.parent / "state/train.diverged.json"
        note.parent.mkdir()
        note.write_text('{"key": "of older packages", "message": "it diverged"}')
        for until in range(1, EPOCHS):
            assert self.train_and_end(recipe, 1000, until=until) == 0, said(recipe)
            self.check_part(recipe, plain, until)
            assert not note.exists()
        assert self.train_and_end(recipe, 1000) == 0, said(recipe)
        assert read(recipe.parent / "adapter") == read(plain.parent / "adapter")
        assert [f"Resuming after step {STEPS * until}," in said(recipe) for until in (1, 2)] == [True, True]
        assert not (recipe.parent / "state/train").exists()

    def test_a_part_that_was_killed_goes_on(self, plain: Path, recipe: Path) -> None:
        assert self.train_and_end(recipe, 2, "killed in a step", 3, until=1) == KILLED
        assert self.train_and_end(recipe, 2, "killed before it is published", until=1) == KILLED
        assert self.train_and_end(recipe, 1000, until=1) == 0
        self.check_part(recipe, plain, 1)
        assert self.train_and_end(recipe, 2, "killed in a step", STEPS + 3) == KILLED
        assert self.train_and_end(recipe, 1000) == 0
        assert read(recipe.parent / "adapter") == read(plain.parent / "adapter")

    def test_an_epoch_that_was_passed_is_published_without_training(self, plain: Path, recipe: Path) -> None:
        assert self.train_and_end(recipe, 1000, until=2) == 0
        before = said(recipe)
        assert self.train_and_end(recipe, 1000, until=1) == 0
        self.check_part(recipe, plain, 1)
        assert "Resuming" not in said(recipe).removeprefix(before)
        assert self.train_and_end(recipe, 1000) == 0
        assert read(recipe.parent / "adapter") == read(plain.parent / "adapter")

    def test_it_does_not_pause_at_its_end(self, recipe: Path) -> None:
        assert self.train_and_end(recipe, 1000, until=EPOCHS) == 1
        assert not (recipe.parent / "adapter").exists()
