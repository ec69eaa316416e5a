"""A finished sweep of a tiny model, made once by real jobs, that tests look at and plan changes of."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sweep import MODES, TRAINED_POINTS, Sweep, make_sweep, run_stage


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @cache
    def make(*arguments: str) -> Path:
        directory = tmp_path_factory.mktemp("model") / "tiny"
        run_stage("train", "tiny_model.py", "--output", directory, *arguments)
        return directory

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("--family", "llama3")


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[..., Sweep]:
    def make(name: str, **sections: Any) -> Sweep:
        return make_sweep(tmp_path_factory.mktemp(name), model, name, **sections)

    return make


@pytest.fixture(scope="session")
def finished(make: Callable[..., Sweep], tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A finished sweep of one training in the three modes, and the baseline; run with a home of its own."""
    sweep = make("modes", **MODES)
    sweep.environment["HOME"] = str(tmp_path_factory.mktemp("home"))
    sweep.edit(plan={"count": True})
    sweep.run()
    return sweep


@pytest.fixture(scope="session")
def trained(make: Callable[..., Sweep]) -> Sweep:
    """Points that are trained and not evaluated."""
    sweep = make("trained", variables={"seed": list(range(TRAINED_POINTS))})
    sweep.edit(controls={"epochs": 2}, evaluation={"baseline": False, "enabled": False})
    sweep.run("--set-threads", "train=1")
    sweep.edit(evaluation={"baseline": False, "enabled": True, "tasks": [{"task": "tasks.py@letters", "limit": 1}]})
    return sweep
