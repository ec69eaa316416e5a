"""A training by trl that pauses."""

from pathlib import Path

import pytest

import interrupted_trl
from pauses import Pauses
from tiny_model import save_model

pytestmark = pytest.mark.long  # tests/train says so of the frame that both trainers have


class TestPauses(Pauses):
    trainer = "trl"
    train_and_end = staticmethod(interrupted_trl.train_and_end)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_model(tmp_path_factory.mktemp("model") / "tiny")
