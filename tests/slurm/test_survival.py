"""Trainings that SLURM ends go on: one that has to give way, one over its time or memory, one that is cancelled."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster import Cluster
from lorasweep.trainers.training_log import read_log
from monkey import find_program
from slurm_sweep import SlurmSweep, end_time_now, get_node, wait_for
from sweep import Sweep, make_sweep

POINT = "lora_rank=4__seed=1"
SECTIONS = {"variables": {"lora_rank": [4], "seed": [1]}}
CONTROLS = {"epochs": 60, "lora_dropout": 0.1}
TRAINING_ONLY = {"enabled": False, "baseline": False}
TRAINED = ("--until", "take")


def get_weights(sweep: Sweep) -> bytes:
    return (sweep.results / POINT / "adapter/adapter_model.safetensors").read_bytes()


def wait_for_steps(sweep: SlurmSweep, more_than: int = 0) -> str:
    """Wait until some steps more than so many are trained, and return the job that trains them."""
    sweep.wait_for("a recipe", lambda: list(sweep.results.glob("trainings/*/recipe.yaml")))
    log = sweep.find_training(POINT) / "state/train/training_log.csv"
    sweep.wait_for("some steps", lambda: log.exists() and len(read_log(log)) > more_than + 5)
    [job] = sweep.list_jobs()
    return job


@pytest.fixture(scope="session")
def undisturbed(make_once: Callable[..., Path], model: Path) -> bytes:
    """The weights of a training that nothing disturbs."""

    def train(folder: Path) -> None:
        sweep = make_sweep(folder / "sweep", model, "survival", **SECTIONS)
        sweep.edit(controls=CONTROLS, evaluation=TRAINING_ONLY)
        sweep.run("--cores", "1", "--set-threads", "train=1", *TRAINED)
        (folder / "weights").write_bytes(get_weights(sweep))

    return (make_once("undisturbed", train) / "weights").read_bytes()


@pytest.fixture
def sweep(make: Callable[..., SlurmSweep]) -> SlurmSweep:
    made = make("survival", trainer="torchtune", **SECTIONS)
    made.edit(controls=CONTROLS, evaluation=TRAINING_ONLY)
    return made


@pytest.mark.usefixtures("apart")
def test_a_training_that_has_to_give_way_is_queued_again_by_slurm_and_goes_on(
    sweep: SlurmSweep, undisturbed: bytes, own_cluster: Cluster
) -> None:
    preemptible = ["--default-resources", "slurm_partition=apart_preemptible", "mem_mb=4000", "runtime=60"]
    run = sweep.start("--retries", "0", *TRAINED, *preemptible)
    job = wait_for_steps(sweep)
    # It stands still until it is told to go on or to end, so that it is not over before.
    program = find_program(job)
    program.send_signal(signal.SIGSTOP)
    more_important = ["sbatch", "--partition=apart", f"--nodelist={get_node(job)}", "--exclusive", "--output=/dev/null"]
    subprocess.run([*more_important, "--wrap", "true"], check=True)
    show = ["scontrol", "show", "job", job]

    def is_preempted() -> bool:
        # Once it is queued again, only the number of its starts says so.
        shown = subprocess.run(show, capture_output=True, text=True).stdout
        return "PreemptTime=2" in shown or "Restarts=1" in shown

    sweep.wait_for("its preemption", is_preempted)
    with suppress(psutil.NoSuchProcess):
        program.send_signal(signal.SIGCONT)
    assert sweep.wait(run) == 0, sweep.said[-4000:]
    shown = subprocess.run(show, capture_output=True, text=True).stdout
    assert re.search(r"Restarts=1\b", shown)
    assert sweep.said.count(", as SLURM job ") == 1
    assert "Resuming after step" in sweep.find_training_log(POINT).read_text()
    assert get_weights(sweep) == undisturbed


def find_last_word(sweep: SlurmSweep) -> re.Match[str] | None:
    return re.search(r"\(SIGTERM\); step (\d+) is saved", sweep.find_training_log(POINT).read_text())


@pytest.mark.long  # the test above says so of SLURM's signal, and tests/e2e of the next run
def test_a_training_that_slurm_ends_goes_on_in_the_next_run(sweep: SlurmSweep, undisturbed: bytes) -> None:
    trained = 0
    for how in ("time limit", "scancel"):
        run = sweep.start("--retries", "0", *TRAINED)
        job = wait_for_steps(sweep, trained)
        # It stands still, so that it is not over before: SLURM has it go on when it ends it.
        find_program(job).send_signal(signal.SIGSTOP)
        if how == "scancel":
            subprocess.run(["scancel", job], check=True)
        else:
            end_time_now(job)
        assert sweep.wait(run) == 1
        assert ("ended it at its time limit" if how == "time limit" else "it was cancelled") in sweep.said
        said = wait_for("its last word", lambda: find_last_word(sweep))
        trained = int(said[1])
    sweep.run("--retries", "0", *TRAINED)
    assert f"Resuming after step {trained}," in sweep.find_training_log(POINT).read_text()
    assert get_weights(sweep) == undisturbed


@pytest.mark.long
def test_a_training_over_its_memory_takes_half_the_batch_in_its_retry(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("over_memory", trainer="torchtune", **SECTIONS)
    sweep.edit(controls={"epochs": 60, "batch_size": 4}, evaluation=TRAINING_ONLY)
    done = sweep.snakemake("--retries", "1", *TRAINED, "--set-resources", "train:mem_mb=400*attempt**3")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "An earlier attempt was killed for running out of memory" in sweep.find_training_log(POINT).read_text()
    assert json.loads((sweep.results / POINT / "adapter/lorasweep.json").read_text())["batch_size_used"] == 2
