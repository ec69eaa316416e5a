"""The status of a run: what is read of it, and what a person sees."""

import json
import os
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from lorasweep.running.controller import hold
from lorasweep.running.status import (
    MOST_LISTED,
    FailureStatus,
    JobStatus,
    RunStatus,
    Step,
    get_training_log,
    read_status,
    read_step,
    write_status,
)
from lorasweep.running.status_view import is_going_on, render, watch

LOG = get_training_log("lora_rank=8-123")

HEADER = "step,epoch,loss,lr,tokens,seconds,validation_loss\n"


def tell(seconds_ago: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds_ago)).isoformat(timespec="seconds")


def make_job(**changes: Any) -> JobStatus:
    values = {"rule": "train", "name": "lora_rank=8", "log": LOG, "points": 1, "since": tell(300), "slurm_job": None}
    return JobStatus.model_validate(values | {"steps": 40, "seconds_left": 600.0} | changes)


def make_status(**changes: Any) -> RunStatus:
    values = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": tell(4000),
        "updated": tell(2),
        "interval_seconds": 5.0,
        "points": {"waiting": 12, "training": 1, "trained": 0, "evaluating": 0, "done": 3, "failed": 1},
        "jobs": 40,
        "jobs_done": 9,
        "running": [make_job()],
        "running_jobs": 1,
        "failures": [FailureStatus(rule="train", point="lr=9", reason="it diverged", log="logs/train/lr=9.log")],
        "failed_jobs": 1,
        "kept_bytes": 41_000_000,
        "planned_kept_bytes": 123_000_000,
        "temporary_bytes": 5_000_000,
        "peak_temporary_bytes": 16_000_000,
        "seconds_left": 7200.0,
        "planned_wall_seconds": 9000.0,
        "error": 1.13,
    }
    return RunStatus.model_validate(values | changes)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results/e"
    folder.mkdir(parents=True)
    return folder


def begin(results: Path, **changes: Any) -> None:
    hold(results / ".controller.json", [])
    write_status(make_status(**changes), results / "status.json")


def show(results: Path, height: int | None = None, width: int = 100) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(render(results, height))
    return captured.get()


def test_a_run_is_shown_with_its_points_jobs_failures_bytes_and_time(results: Path) -> None:
    begin(results)
    log = results / LOG
    log.parent.mkdir(parents=True)
    log.write_text(HEADER + "30,2,1.23456,0.001,4000,55.2,\n")
    said = show(results)
    assert "e: running since" in said
    assert "9 of 40 jobs done" in said
    assert "Points: 17. waiting 12, training 1, trained 0, evaluating 0, done 3, failed 1." in said
    job = next(line for line in said.splitlines() if "lora_rank=8" in line)
    assert job.split()[0] == "train"
    assert job.split()[3:] == ["5", "min", "30", "of", "40", "1.235", "10", "min"]
    assert "failed: train of lr=9: it diverged" in said
    assert "its log: logs/train/lr=9.log" in said
    assert "On disk: 41 MB kept of 123 MB planned; 5 MB temporary, 16 MB at the peak" in said
    assert "Time left: about 2.0 h (jobs so far took 1.13x their planned time)." in said


def test_a_run_whose_plan_is_used_up_does_not_say_that_it_is_at_its_end(results: Path) -> None:
    begin(results, running=[make_job(rule="evaluate", seconds_left=None)], seconds_left=None, error=2.5)
    assert "Time left: not known (jobs so far took 2.50x their planned time)." in show(results)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_nothing_is_cut_on_a_narrow_screen_and_names_fold_between_their_parts(results: Path, width: int) -> None:
    name = "lora_attn_modules=q_proj+v_proj__lora_rank=8__lr=1e-4__weight_decay=1e-2__seed=12"
    begin(results, running=[make_job(name=name)])
    said = show(results, width=width)
    assert max(map(len, said.splitlines())) <= width
    assert "…" not in said
    words = "".join(word for word in said.split() if "=" in word and word != "lr=9:")
    assert words.startswith(name)
    assert all(set(word.strip("_").split("__")) <= {*name.split("__")} for word in said.split() if word.endswith("__"))


def test_a_small_screen_shows_the_first_jobs_and_counts_the_rest(results: Path) -> None:
    begin(results, running=[make_job(name=f"seed={i}") for i in range(MOST_LISTED)], running_jobs=300)
    said = show(results, height=30)
    assert "seed=0 " in said
    assert "seed=50" not in said
    assert len(said.splitlines()) <= 30
    assert f"... {300 - said.count('seed=')} more" in said
    assert f"... {300 - MOST_LISTED} more" in show(results)


@pytest.mark.parametrize("width", [60, 80])
def test_names_that_fold_leave_room_for_fewer_jobs(results: Path, width: int) -> None:
    name = "lora_attn_modules=q_proj+k_proj+v_proj+output_proj__lora_rank=8__lr=1e-4"
    begin(results, running=[make_job(name=f"{name}__seed={i}") for i in range(MOST_LISTED)], running_jobs=300)
    said = show(results, height=40, width=width)
    assert f"... {300 - said.count('seed=')} more" in said
    # The sentences beside the jobs fold too on a terminal of fewer than 80 columns.
    assert len(said.splitlines()) <= (40 if width == 80 else 45)


def test_a_reason_is_shown_whole_and_on_a_screen_its_first_lines(results: Path) -> None:
    reason = "\n".join([f"line {number}" for number in range(30)] + ["x" * 500])
    failures = [FailureStatus(rule="train", point=f"lr={i}", reason=reason, log=f"logs/{i}.log") for i in range(5)]
    begin(results, failures=failures, running=[make_job(name=f"seed={i}") for i in range(50)], running_jobs=50)
    assert "failed: train of lr=0: line 0\n  line 1\n" in (said := show(results, width=1000))
    assert said.count("  line 29\n  " + "x" * 500) == 5
    assert "  line 3\n  ...\n  its log: logs/4.log\n" in (said := show(results, height=50))
    assert "line 4" not in said
    assert len(said.splitlines()) <= 50


def test_a_job_in_a_schedulers_queue_is_told_from_one_that_began(results: Path) -> None:
    begin(results, running=[make_job(slurm_job="7", job_log="logs/train/lora_rank=8-0123456789.log")])
    assert "queued" in show(results)
    log = results / "logs/train/lora_rank=8-0123456789.log"
    log.parent.mkdir(parents=True)
    log.touch()
    assert "queued" not in show(results)
    os.utime(log, (time.time() - 900, time.time() - 900))  # of an earlier attempt
    assert "queued" in show(results)


def test_a_run_that_ended_says_how_and_what_is_done(results: Path) -> None:
    for outcome, words in {
        "done": "all its jobs done",
        "failed": "with failures",
        "interrupted": "interrupted",
    }.items():
        write_status(make_status(outcome=outcome, seconds_left=None, running=[]), results / "status.json")
        said = show(results, width=200)
        assert "e: no run is going on. The last ended at" in said
        assert words in said
        assert "9 of 40 jobs done" in said
        assert "Time left" not in said


def test_a_run_that_was_killed_is_not_shown_as_one_that_goes_on(results: Path) -> None:
    write_status(make_status(), results / "status.json")
    assert "no run is going on. The last was killed" in show(results)
    holder = {"host": socket.gethostname(), "user": "u", "pid": os.getpid(), "started": 0.0}
    (results / ".controller.json").write_text(json.dumps(holder))
    assert not is_going_on(results)
    said = show(results)
    assert "no run is going on. The last was killed" in said
    assert "lora_rank=8" not in said


def test_a_run_on_a_machine_that_is_silent_is_said_to_be(results: Path) -> None:
    holder = {"host": "elsewhere", "user": "u", "pid": 1, "started": 0.0}
    (results / ".controller.json").write_text(json.dumps(holder))
    write_status(make_status(host="elsewhere", pid=1, updated=tell(600)), results / "status.json")
    said = show(results)
    assert "by u on elsewhere. No update for 10 min" in said.replace("\n", " ")


def test_without_a_status_it_says_so_and_counts_what_is_done(results: Path) -> None:
    (results / "a").mkdir()
    (results / "a/manifest.json").write_text("{}")
    said = show(results)
    assert "e: no run is going on, and there is no status of an earlier one." in said
    assert "Points with a manifest" in said
    hold(results / ".controller.json", [])
    write_status(make_status(pid=psutil.Process().ppid()), results / "status.json")  # of the run before
    assert "e: is being run by" in show(results)


def test_without_a_terminal_it_is_said_once(results: Path, tmp_path: Path) -> None:
    begin(results)
    with (tmp_path / "said.txt").open("w") as file:
        watch(results, Console(file=file, width=100))
    said = (tmp_path / "said.txt").read_text()
    assert said.count("jobs done") == 1
    assert "\x1b" not in said


def test_in_a_terminal_it_ends_with_the_run(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(results)
    ends = iter([lambda: None, lambda: (results / ".controller.json").unlink()])
    monkeypatch.setattr(time, "sleep", lambda seconds: next(ends)())
    with (tmp_path / "said.txt").open("w") as file:
        watch(results, Console(file=file, width=100, force_terminal=True))
    assert "The last was killed" in (tmp_path / "said.txt").read_text()
    assert next(ends, None) is None


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("", None),
        (HEADER, None),
        (HEADER + "1,0,2.5,0.1,10,1.0,\n", Step(1, 2.5)),
        (HEADER + "1,0,2.5,0.1,10,1.0,\n2,0,2.25,0.1,10,2.0,2.4\n", Step(2, 2.25)),
        (HEADER + "1,0,2.5,0.1,10,1.0,\n2,0,2.2", Step(1, 2.5)),
        (HEADER + "1,0,2.5,0.1,10,1.0,\n2,0\n", Step(1, 2.5)),
        (HEADER + "9,0,2.5,0.1,10,1.0,\n" * 1000, Step(9, 2.5)),
        ("other,columns\n1,2\n", None),
    ],
)
def test_the_last_whole_step_of_a_training_is_read(tmp_path: Path, text: str, step: Step | None) -> None:
    (tmp_path / "training_log.csv").write_text(text)
    assert read_step(tmp_path / "training_log.csv") == step


def test_what_is_not_there_or_half_there_is_no_status(tmp_path: Path) -> None:
    assert read_step(tmp_path / "none.csv") is None
    assert read_status(tmp_path / "none.json") is None
    (tmp_path / "status.json").write_text('{"began"')
    assert read_status(tmp_path / "status.json") is None
