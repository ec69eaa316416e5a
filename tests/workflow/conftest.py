"""Sweeps that are only planned, on a checkpoint whose weights are all zero."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plain_checkpoint import write_checkpoint
from sweep import Sweep, make_sweep


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model") / "plain", shards=2)


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Callable[..., Sweep]:
    def make(**sections: Any) -> Sweep:
        return make_sweep(tmp_path, model, "planned", **{"variables": {"lora_rank": [4, 8]}, **sections})

    return make
