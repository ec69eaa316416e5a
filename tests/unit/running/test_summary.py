"""What a run says at its end: the reason in a line, and what is left."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep.running.events import Failure, FailureRecorder, find_reason
from lorasweep.running.summary import summarise, write_failures

REASONS = [
    ("step 1\ntrain: the training diverged\n", "", "train: the training diverged"),
    (
        "OSError: [Errno 28] No space left on device\nTrainingError: ended\n",
        "",
        "the disk is full (OSError: [Errno 28]",
    ),
    ("OSError: [Errno 122] Disk quota exceeded\n", "", "the disk quota is used up"),
    ("torch.OutOfMemoryError: CUDA out of memory.\n", "", "the GPU's memory was not enough"),
    (
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\n",
        "",
        "the GPU's memory was not enough",
    ),
    (
        "Traceback (most recent call last):\n  File 'x'\nValueError: one\n\n  two\n"
        "Why this job failed:\ntrain: one\n  two\n",
        "",
        "train: one\n  two",
    ),
    (
        "Traceback (most recent call last):\n  File 'x', line 1\n    x()\nDatasetError: line 3\n  of the file\n",
        "SLURM status is: 'FAILED'",
        "DatasetError: line 3\n  of the file",
    ),
    ("x" * 300, "", "x" * 300),
    (
        "Why this job failed:\ntrain: CUDA out of memory; batch_size 4 is too large\nTried to allocate 2 GiB\n",
        "",
        "the GPU's memory was not enough (train: CUDA out of memory; batch_size 4 is too large\nTried to allocate 2",
    ),
    (
        "OSError: [Errno 28] No space left on device\nWhy this job failed:\nmerge: could not\nbe written\n",
        "",
        "the disk is full (OSError: [Errno 28] No space left on device)\nmerge: could not\nbe written",
    ),
    ("half way\n", "SLURM status is: 'TIMEOUT'", "SLURM ended it at its time limit"),
    ("half way\n", "SLURM status is: 'OUT_OF_MEMORY'", "SLURM killed it for running out of memory"),
    ("half way\n", "SLURM status is: 'CANCELLED'", "it was cancelled"),
    ("", "SLURM status is: 'FAILED'", "SLURM reports FAILED"),
    ("", "", "no reason found in its log"),
]


@pytest.mark.parametrize(("text", "message", "reason"), REASONS)
def test_the_reason_is_the_schedulers_or_the_logs(tmp_path: Path, text: str, message: str, reason: str) -> None:
    log = tmp_path / "point.log"
    log.write_text(text)
    assert find_reason(log, message).startswith(reason)


def test_a_job_killed_for_its_memory_is_found_in_the_schedulers_log(tmp_path: Path) -> None:
    (tmp_path / "point.log").write_text("Loading weights\n")
    (tmp_path / "7.log").write_text(
        "slurmstepd: error: StepId=7.0 exceeded memory limit (3 > 2), being killed\nsrun: x\n"
    )
    reason = find_reason(tmp_path / "point.log", "SLURM status is: 'FAILED'", [tmp_path / "7.log"])
    assert reason.startswith("SLURM killed it for running out of memory")


def test_a_failure_that_a_retry_mends_is_forgotten(tmp_path: Path) -> None:
    recorder = FailureRecorder(tmp_path, {"lr=1e-1-123": "lr=1e-1"})
    log = tmp_path / "train" / "lr=1e-1-123.log"
    error = {"event": "job_error", "rule_name": "train", "rule_msg": None, "jobid": 3, "log": [str(log)]}
    recorder.emit(logging.makeLogRecord(error))
    recorder.emit(logging.makeLogRecord({**error, "jobid": 4}))
    assert [(failure.rule, failure.point) for failure in recorder.failures] == [("train", "lr=1e-1")] * 2
    recorder.emit(logging.makeLogRecord({"event": "job_finished", "job_id": 3}))
    assert len(recorder.failures) == 1


def test_a_job_whose_outputs_do_not_appear_has_failed(tmp_path: Path) -> None:
    """Snakemake finds the outputs missing after the job's end, and says it without an event of the job."""
    (tmp_path / "Snakefile").write_text(
        "from pathlib import Path\n"
        "from lorasweep.running.events import FailureRecorder, JobWatcher\n"
        "recorder, watcher = FailureRecorder(Path('logs'), {}), JobWatcher({})\n"
        "for handler in (recorder, watcher): logger.addHandler(handler)\n"
        "onerror: print([(one.point, one.reason) for one in recorder.failures], len(watcher.attempts))\n"
        "rule evaluate:\n output: 'a/{point}.json'\n log: 'logs/evaluate/{point}.log'\n"
        " shell: 'echo all is well > {log}'\n"
    )
    options = ["--cores=1", "--latency-wait=0", "--scheduler=greedy", "--retries=1"]
    command = ["-m", "snakemake", *options, "a/p.json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "workflow")}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[('p', 'it ended without an error, but not all of its output files appeared')] 2"


def test_the_end_says_what_is_done_what_failed_and_how_to_go_on(tmp_path: Path) -> None:
    results = tmp_path / "sweep"
    (results / "a").mkdir(parents=True)
    (results / "a/manifest.json").write_text("{}")
    log = tmp_path / "b.log"
    log.write_text("one\rtwo\nWhy this job failed:\na reason\nof two lines\n")
    failure = Failure("train", "b", "a reason\nof two lines", log)
    said = summarise(results, ["a", "b", "c"], {"b", "c"}, [failure], "snakemake -c2")
    assert said.splitlines() == [
        "sweep: 1 of 3 points done, 1 failed, 1 not finished",
        "  failed: train of b: a reason",
        "    of two lines",
        f"    its log: {log}",
        "    | one",
        "    | two",
        "To continue with what is missing: snakemake -c2",
    ]


def test_a_point_with_a_job_that_was_not_done_is_not_done(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")  # of an earlier evaluation
    failure = Failure("evaluate_adapters", "b+1-123456", "it was cancelled", tmp_path / "none.log")
    said = summarise(tmp_path, ["a", "b", "c"], {"b", "c"}, [failure], "snakemake -c2")
    assert "1 of 3 points done, 0 failed, 2 not finished" in said
    assert "failed: evaluate_adapters of b+1-123456: it was cancelled" in said


def test_failures_are_written_for_others_to_read(tmp_path: Path) -> None:
    write_failures(
        [Failure("train", "lr=0.1", "it diverged", Path("logs/train/lr=0.1.log"))], tmp_path / "failures.json"
    )
    assert json.loads((tmp_path / "failures.json").read_text()) == [
        {"rule": "train", "point": "lr=0.1", "reason": "it diverged", "log": "logs/train/lr=0.1.log"}
    ]
