"""A training that is interrupted in a real run goes on in its retry, and in the next run."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lorasweep.trainers.training_log import read_log
from sweep import ROOT, Sweep

POINT = "point"

ONE_THREAD = ("--set-threads", "train=1")


@pytest.fixture(scope="module")
def undisturbed(make: Callable[..., Sweep]) -> Sweep:
    sweep = make("undisturbed", runs=[{"name": POINT}])
    # Long enough to be met while it runs, and with random numbers drawn in each step.
    sweep.edit(controls={"epochs": 40, "lora_dropout": 0.1}, evaluation={"enabled": False})
    return sweep


def get_weights(sweep: Sweep) -> bytes:
    return (sweep.results / POINT / "adapter/adapter_model.safetensors").read_bytes()


def find_training(run: subprocess.Popen[bytes], log: Path, steps: int) -> psutil.Process:
    """Wait until so many steps are logged, and return the process that makes them."""
    deadline = time.monotonic() + 180
    while len(read_log(log)) < steps and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(read_log(log)) >= steps
    [training] = [p for p in psutil.Process(run.pid).children(recursive=True) if "train.py" in " ".join(p.cmdline())]
    return training


def test_a_training_that_is_told_to_end_goes_on_in_its_retry_and_in_the_next_run(
    undisturbed: Sweep, tmp_path: Path
) -> None:
    sweep = undisturbed.copy(tmp_path)
    undisturbed.run(*ONE_THREAD)
    running = sweep.results / POINT / "state/train/training_log.csv"
    stopped_at = 0
    for retries in ("0", "1"):
        with (sweep.directory / f"said-{retries}.log").open("w") as said:
            command = sweep.command("--cores", "2", *ONE_THREAD, "--retries", retries)
            run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said)
        training = find_training(run, running, stopped_at + 5)
        training.terminate()
        assert run.wait() == int(retries == "0")
        if retries == "0":
            assert "train: told to stop (SIGTERM); step" in (sweep.directory / "said-0.log").read_text()
            assert not (sweep.results / POINT / "adapter").exists()
            stopped_at = read_log(running)[-1].step
    assert "Going on after step" in (sweep.results / f"logs/train/{POINT}.log").read_text()
    rows = read_log(sweep.results / POINT / "adapter/training_log.csv")
    assert [row.step for row in rows] == list(range(1, 201))
    assert 5 <= stopped_at < 200
    assert get_weights(sweep) == get_weights(undisturbed)
    assert not (sweep.results / POINT / "state").exists()
