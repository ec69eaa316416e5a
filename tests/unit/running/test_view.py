"""What a run prints: a line for a job's start and end, in words of the sweep, and nothing of Snakemake's own."""

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from lorasweep.running import view
from lorasweep.running.view import RunView, get_label


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run(said: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunView]:
    monkeypatch.setattr(
        view, "LABELS", {"train": {"r8-0123456789": "r8"}, "evaluate_adapters": {"b1": "r8 and 2 more"}}
    )
    made = RunView(said, get_label)
    yield made
    made.close()


def tell(run: RunView, text: str = "", level: int = logging.INFO, **fields: Any) -> None:
    run.emit(logging.makeLogRecord({"msg": text, "levelno": level, **fields}), text)


def start(run: RunView, job: int, rule: str, **wildcards: str) -> None:
    tell(run, event="job_started", jobs=[job])
    tell(run, "rule train: ...", event="job_info", jobid=job, rule_name=rule, wildcards=wildcards)


def test_jobs_are_told_in_words_of_the_sweep(run: RunView, said: io.StringIO) -> None:
    tell(run, "Job stats: ...", event="run_info", stats={"train": 1, "total": 9})
    start(run, 1, "configure", training="r8-0123456789")
    tell(run, event="job_finished", job_id=1)
    tell(run, "1 of 9 steps (11%) done", event="progress", done=1, total=9)
    start(run, 2, "train", training="r8-0123456789")
    tell(run, "Job 2 has been submitted with SLURM jobid 77 (log: x).")
    tell(run, event="job_finished", job_id=2)
    tell(run, "2 of 9 steps (22%) done", event="progress", done=2, total=9)
    start(run, 3, "evaluate_adapters", batch="b1")
    error = {"event": "job_error", "jobid": 3, "log": ["logs/b1.log"], "rule_msg": "SLURM status is: 'TIMEOUT'"}
    tell(run, "Error in rule ...", logging.ERROR, **error)
    tell(run, "Trying to restart job 3.")
    start(run, 4, "collect")
    tell(run, event="job_finished", job_id=4)
    assert said.getvalue().splitlines() == [
        "Job stats: ...",
        "r8: training",
        "r8: training, as SLURM job 77",
        "r8: trained (job 2 of 9)",
        "r8 and 2 more: evaluating",
        "r8 and 2 more: evaluating failed (SLURM: TIMEOUT); its log: logs/b1.log",
        "r8 and 2 more: evaluating again",
        "results: table written (job 3 of 9)",
    ]


def test_what_only_snakemake_says_is_not_printed_but_what_matters_is(run: RunView, said: io.StringIO) -> None:
    for noise in ("Building DAG of jobs...", "Select jobs to execute...", "Execute 3 jobs...", "Provided cores: 2"):
        tell(run, noise)
    tell(run, "Job stats: ...", event="run_info")
    tell(run, "Job stats: ...", event="run_info")
    tell(run, "Creating conda environment envs/eval.yaml...")
    tell(run, "Building DAG of jobs fails", logging.WARNING)
    tell(run, "RuleException:\nCalledProcessError in file ...", logging.ERROR, event="error")
    assert said.getvalue().splitlines() == [
        "Job stats: ...",
        "Creating conda environment envs/eval.yaml...",
        "Building DAG of jobs fails",
    ]


def test_where_lines_stay_a_job_says_how_far_it_is_now_and_then(
    run: RunView, said: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(view.time, "monotonic", lambda: now)
    for step in range(100):
        run.show([("r8", f"training, step {step} of 100")])
        now += 6
    assert said.getvalue().splitlines() == ["r8: training, step 50 of 100"]


def test_a_terminal_has_lines_of_what_runs_under_what_was_said(run: RunView, said: io.StringIO) -> None:
    run._console = Console(file=said, force_terminal=True, width=80)
    run.show((f"r{number}", "training, step 3 of 9") for number in range(12))
    run.show([("r1", "training, step 4 of 9")])
    start(run, 1, "merge", point="r8")
    run.close()
    assert "  r0: training, step 3 of 9" in said.getvalue()
    assert "  ... 2 more: lorasweep status" in said.getvalue()
    assert "  r1: training, step 4 of 9" in said.getvalue()
    assert "r8: merging\n" in said.getvalue()
