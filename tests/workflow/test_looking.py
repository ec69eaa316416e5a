"""`lorasweep status` and `lorasweep verify`: they look at the experiment of the file, and touch nothing of a run."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sweep import Sweep


def list_files(sweep: Sweep) -> set[Path]:
    return {path for path in sweep.directory.rglob("*") if ".snakemake" not in path.parts}


@pytest.fixture
def locked(make: Callable[..., Sweep]) -> Sweep:
    """A sweep that a process which lives holds, with its lock on all that is there."""
    sweep = make()
    sweep.run("configure_all")
    process = psutil.Process()
    holder = {"host": socket.gethostname(), "user": "somebody", "pid": process.pid, "started": process.create_time()}
    (sweep.results / ".controller.json").write_text(json.dumps(holder))
    locks = sweep.directory / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    recipe = sweep.find_training("lora_rank=4") / "recipe.yaml"
    (locks / "0.output.lock").write_text(f"{recipe.relative_to(sweep.directory)}\n")
    (locks / "0.input.lock").write_text("train.jsonl\n")
    return sweep


def test_the_status_of_a_sweep_that_never_ran_is_that_none_did(make: Callable[..., Sweep]) -> None:
    sweep = make()
    before = list_files(sweep)
    said = sweep.call("status")
    assert "planned: no run is going on, and there is no status of an earlier one." in said
    assert list_files(sweep) == before


def test_a_run_leaves_its_last_status_its_storage_and_its_failures(make: Callable[..., Sweep]) -> None:
    sweep = make(variables={"lora_rank": [4]})
    sweep.run("configure_all")
    said = " ".join(sweep.call("status").split())
    assert "with all its jobs done: 1 of 1 jobs done." in said
    assert "Points: 2. waiting 2, training 0, trained 0, evaluating 0, done 0, failed 0." in said
    assert (sweep.results / "storage.csv").read_text().startswith("time,kept_bytes,temporary_bytes\n20")
    assert not (sweep.results / "failures.json").exists()
    # The model has no tokenizer that could train.
    failed = sweep.snakemake("--config", "evaluation={baseline: false}")
    assert failed.returncode == 1
    failures = json.loads((sweep.results / "failures.json").read_text())
    assert [(failure["rule"], failure["point"]) for failure in failures] == [("train", "lora_rank=4")]
    assert all(Path(sweep.directory, failure["log"]).is_file() and failure["reason"] for failure in failures)
    # The whole reason, and nothing else, is what the job said last.
    [failure] = failures
    log = Path(sweep.directory, failure["log"]).read_text()
    assert failure["reason"] == log.partition("\nWhy this job failed:\n")[2].strip()
    assert failure["reason"].startswith("train: torchtune failed; ")
    assert f"failed: train of lora_rank=4: {failure['reason']}\n" in failed.stdout + failed.stderr
    said = " ".join(sweep.call("status").split())
    assert "with failures" in said
    assert "failed 1." in said
    assert f"failed: train of lora_rank=4: {' '.join(failure['reason'].split())}" in said
    # What ends well leaves none behind.
    (sweep.find_training("lora_rank=4") / "recipe.yaml").unlink()
    sweep.run("configure_all")
    assert not (sweep.results / "failures.json").exists()


def test_a_run_that_goes_on_is_looked_at_without_its_lock(locked: Sweep) -> None:
    before = {path: path.stat().st_mtime_ns for path in locked.directory.rglob("*") if ".snakemake" not in path.parts}
    assert "planned: is being run by somebody on" in locked.call("status")
    assert "there is no manifest" in locked.lorasweep("verify").stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(lock.name for lock in (locked.directory / ".snakemake/locks").iterdir()) == [
        "0.input.lock",
        "0.output.lock",
    ]


def test_looking_needs_neither_the_data_nor_the_model(make: Callable[..., Sweep]) -> None:
    sweep = make()
    (sweep.directory / "train.jsonl").unlink()
    sweep.edit(model={"path": "none"})
    assert "no run is going on" in sweep.call("status")
