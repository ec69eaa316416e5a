"""A finished sweep of a tiny model, made once by real jobs, that tests look at and plan changes of."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls
from lorasweep.trainers.torchtune.models import get_model
from sweep import MODES, TRAINED_POINTS, Sweep, make_sweep, run_stage


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    run_stage("train", "tiny_model.py", "--output", directory, "--family", "llama3")
    return directory


@pytest.fixture(scope="session")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shapes, and other weights."""
    directory = tmp_path_factory.mktemp("model") / "other"
    shutil.copytree(model, directory)
    draw = np.random.default_rng(1)
    tensors = load_file(directory / "model.safetensors")
    others = {name: draw.permutation(value.ravel()).reshape(value.shape) for name, value in tensors.items()}
    save_file(others, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def model_without_template(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, with a tokenizer that has no chat template."""
    directory = tmp_path_factory.mktemp("model") / "bare"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").unlink()
    assert "chat_template" not in (directory / "tokenizer_config.json").read_text()
    return directory


@pytest.fixture(scope="session")
def held_model(model: Path) -> dict[str, Any]:
    """What `controls._override.model` says to have a training that something happens to: see held_training.py."""
    section, _ = get_model(read_checkpoint(model), Controls())
    sizes = {key: value for key, value in section.items() if "lora" not in key}
    return sizes | {"_component_": "held_training.build"}


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
    sweep.run("--set-threads", "train=1", "--until", "cleanup")
    sweep.edit(evaluation={"baseline": False, "enabled": True, "tasks": [{"task": "tasks.py@letters", "limit": 1}]})
    return sweep
