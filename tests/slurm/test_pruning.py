"""Trainings that may stop early on SLURM: those that are cancelled go on, and one that was stopped requests little."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.trainers.training_log import read_log
from monkey import find_differences, find_program
from slurm_sweep import TRAINING_ONLY, SlurmSweep, read_accounting
from sweep import Sweep, make_sweep

EPOCHS, RUNG = 40, 20
WORSE, BETTER = "lr=1e-5", "lr=4e-3"
SECTIONS = {"variables": {"lr": [1e-5, 4e-3]}}


def prepare(sweep: Sweep) -> None:
    samples = (sweep.directory / "train.jsonl").read_text().splitlines(keepends=True)
    (sweep.directory / "held_out.jsonl").write_text("".join(samples[::3]))
    sweep.edit(controls={"epochs": EPOCHS}, data={"validation": "held_out.jsonl"}, evaluation=TRAINING_ONLY)
    sweep.edit(prune={"after": [RUNG], "keep": 0.5})


@pytest.fixture(scope="session")
def undisturbed(make_once: Callable[..., Path], model: Path) -> Path:
    """The results of the same sweep on one machine, which nothing disturbs."""

    def run(folder: Path) -> None:
        sweep = make_sweep(folder, model, "pruning", **SECTIONS)
        prepare(sweep)
        sweep.run("--cores", "1", "--set-threads", "train=1", "train_part=1")

    return make_once("undisturbed_pruning", run) / "results/pruning"


def cancel_training(sweep: SlurmSweep, rule: str, epoch: int) -> None:
    """Run the sweep until the better training is at an epoch, and cancel its job, which is of that rule."""
    run = sweep.start("--retries", "0")

    def find_job() -> str | None:
        logs = list(sweep.results.glob(f"trainings/{BETTER}-*/state/train/training_log.csv"))
        if not logs or not (rows := read_log(logs[0])) or rows[-1].epoch < epoch:
            return None
        jobs = sweep.list_jobs().items()
        return next((job for job, said in jobs if said.startswith(f"rule_{rule}_wildcards_{BETTER}-")), None)

    job = sweep.wait_for(f"epoch {epoch}", find_job)
    # It stands still, so that it is not over before: SLURM has it go on when it ends it.
    find_program(job).send_signal(signal.SIGSTOP)
    subprocess.run(["scancel", job], check=True)
    assert sweep.wait(run) == 1
    assert "it was cancelled" in sweep.said


def read_stays(results: Path) -> dict[str, bool]:
    decision: dict[str, Any] = json.loads((results / f"prune/after={RUNG}.json").read_text())
    return {point: each["stays"] for each in decision["trainings"].values() for point in each["points"]}


@pytest.mark.long  # tests/e2e says so on one machine, and test_survival of a training that SLURM ends
def test_a_part_and_a_continuation_that_are_cancelled_go_on_and_what_stops_requests_little(
    make: Callable[..., SlurmSweep], undisturbed: Path
) -> None:
    sweep = make("pruning", trainer="torchtune", **SECTIONS)
    prepare(sweep)
    cancel_training(sweep, "train_part", 3)
    cancel_training(sweep, "train", RUNG + 3)
    sweep.run("--retries", "0")
    assert find_differences(sweep.results, undisturbed) == []
    assert read_stays(sweep.results) == read_stays(undisturbed) == {WORSE: False, BETTER: True}
    assert sweep.plan() == {}
    requests = read_accounting(sweep, "Comment", "ReqCPUS", "ReqMem")
    assert [request for comment, *request in requests if comment.startswith(f"rule_train_wildcards_{WORSE}-")] == [
        ["1", "1000M"]
    ]
