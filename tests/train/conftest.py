"""A tiny model, and recipes of trainings on it, on the CPU: a GPU that is there is not seen."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import recipes
from tiny_model import save_model

os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def write_samples() -> Callable[[Path, str], Path]:
    return recipes.write_samples


@pytest.fixture(scope="session")
def make_in(model: Path) -> Callable[..., Path]:
    """Write the recipe of a point of a sweep in a directory."""

    def make(directory: Path, *arguments: Any, **named: Any) -> Path:
        return recipes.write_recipe(directory, model, *arguments, **named)

    return make


@pytest.fixture
def make(make_in: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    return partial(make_in, tmp_path)
