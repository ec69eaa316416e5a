"""A tiny model, and recipes of trainings on it."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from lorasweep.checkpoint import read_checkpoint
from lorasweep.experiment import Controls, Data, Model
from lorasweep.trainers import TrainingSpec
from lorasweep.trainers.torchtune import recipe
from tiny_model import make_model, make_tokenizer

# Two batches of an epoch of two steps are left over: torchtune carries them into the next one.
CONTROLS = {"epochs": 2, "batch_size": 3, "gradient_accumulation_steps": 3, "lr": 4e-3, "lora_dropout": 0.1}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model("llama3", tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def write_samples() -> Callable[[Path, str], Path]:
    """Write a file of samples; they are of several lengths, so that batches are padded."""

    def write(file: Path, letters: str) -> Path:
        samples = [{"input": "after " + a * (1 + i % 4), "output": b} for i, (a, b) in enumerate(pairwise(letters))]
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return file

    return write


@pytest.fixture(scope="session")
def make_in(model: Path, write_samples: Callable[[Path, str], Path]) -> Callable[..., Path]:
    """Write the recipe of a point of a sweep in a directory."""

    def make(directory: Path, point: str = "point", data: dict[str, Any] | None = None, **controls: Any) -> Path:
        spec = TrainingSpec(
            checkpoint=read_checkpoint(model),
            controls=Controls(**{**CONTROLS, **controls}),
            swept=(),
            model=Model(path=str(model), device="cpu", dtype="fp32"),
            data=Data(train=str(write_samples(directory / "train.jsonl", ascii_lowercase)), **(data or {})),
            output_dir=str(directory / "sweep" / point),
        )
        file = directory / "sweep" / point / "recipe.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(recipe(spec))
        return file

    return make


@pytest.fixture
def make(make_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(*arguments: Any, **named: Any) -> Path:
        return make_in(tmp_path, *arguments, **named)

    return make
