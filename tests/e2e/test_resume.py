"""A training that is interrupted in a real run goes on in its retry, and in the next run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.trainers.training_log import read_log
from sweep import ROOT, Sweep

POINT = "point"

STEPS = 15

ONLY_TRAIN = ("--set-threads", "train=1", "--until", "take")


@pytest.fixture
def sweep(make: Callable[..., Sweep], held_model: dict[str, Any]) -> Sweep:
    """Three epochs of five steps, with random numbers drawn in each step."""
    sweep = make("interrupted", runs=[{"name": POINT}])
    controls = {"epochs": 3, "lora_dropout": 0.1, "_override": {"model": held_model}}
    sweep.edit(controls=controls, evaluation={"enabled": False})
    sweep.environment["PYTHONPATH"] = str(ROOT / "tests/e2e")
    return sweep


def get_weights(sweep: Sweep) -> bytes:
    return (sweep.results / POINT / "adapter/adapter_model.safetensors").read_bytes()


def test_a_training_that_is_told_to_end_goes_on_in_its_retry_and_in_the_next_run_bit_for_bit(
    sweep: Sweep, tmp_path: Path
) -> None:
    undisturbed = sweep.copy(tmp_path)
    undisturbed.run(*ONLY_TRAIN)
    sweep.environment["LORASWEEP_AT_STEP"] = "6:tell"
    done = sweep.snakemake(*ONLY_TRAIN, "--retries", "0")
    assert done.returncode == 1
    assert "train: told to stop (SIGTERM); step" in done.stdout + done.stderr
    assert not (sweep.results / POINT / "adapter").exists()
    stopped_at = read_log(sweep.find_training(POINT) / "state/train/training_log.csv")[-1].step
    sweep.environment["LORASWEEP_AT_STEP"] = "10:tell"
    said = sweep.run(*ONLY_TRAIN, "--retries", "1")
    assert said.count(": training again\n") == 1
    assert "Resuming after step" in sweep.find_training_log(POINT).read_text()
    rows = read_log(sweep.results / POINT / "adapter/training_log.csv")
    assert [row.step for row in rows] == list(range(1, STEPS + 1))
    assert 6 <= stopped_at < 10
    assert get_weights(sweep) == get_weights(undisturbed)
