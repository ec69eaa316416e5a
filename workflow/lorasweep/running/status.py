"""The status of a run, as a small file that the run renews and anybody may read: `lorasweep status` shows it.

Its size depends on the jobs that run, and not on the points. What a training says of itself is read where it lies.
"""

import csv
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ValidationError

from lorasweep.layout import STATE, TRAINING_LOG, TRAININGS
from lorasweep.running.controller import Holder
from lorasweep.util.files import write_aside

STATUS = "status.json"
"""In an experiment's folder."""


def get_training_log(training: str) -> str:
    """Return where in an experiment's folder a training that runs has its log.

    A row for each optimizer step, with `step` and `loss` among its columns.
    """
    return f"{TRAININGS}/{training}/{STATE}/train/{TRAINING_LOG}"


MOST_LISTED = 100
"""Running jobs, and failures, that are listed one by one."""

WELL, BADLY, INTERRUPTED = "done", "failed", "interrupted"

_LAST_BYTES = 4096


class JobStatus(BaseModel, frozen=True):
    """A job that runs, or that a scheduler has queued."""

    rule: str
    name: str
    """The point's, or the batch's; nothing for a job of the whole sweep."""
    points: int
    """Of the job."""
    since: str
    """Its start, or its submission to a scheduler."""
    slurm_job: str | None
    steps: int | None
    """Optimizer steps of a training, all of them."""
    log: str = ""
    """Of a training: in the experiment's folder."""
    seconds_left: float | None
    """None where it is not known, as of a job that takes longer than planned."""


class FailureStatus(BaseModel, frozen=True):
    """A job that failed in its last attempt."""

    rule: str
    point: str
    reason: str
    log: str


class RunStatus(BaseModel, frozen=True):
    """What is known of a run. Times are ISO 8601 in UTC."""

    host: str
    pid: int
    """Of the process that runs it."""
    began: str
    updated: str
    interval_seconds: float
    """Until the next update, as far as one can say."""
    outcome: str = ""
    """Nothing while it goes on; `done`, `failed` or `interrupted`."""
    points: dict[str, int]
    """By stage: see lorasweep.progress."""
    jobs: int
    jobs_done: int
    running: list[JobStatus]
    """The first of them."""
    running_jobs: int
    failures: list[FailureStatus]
    """The last of them."""
    failed_jobs: int
    kept_bytes: int
    planned_kept_bytes: int
    """Of all points."""
    temporary_bytes: int
    peak_temporary_bytes: int
    seconds_left: float | None
    """None after the end, and where it is not known."""
    planned_wall_seconds: float
    error: float | None
    """How many times longer than planned the jobs took so far."""


@dataclass(frozen=True)
class Step:
    """Where a training is."""

    step: int
    loss: float


def write_status(status: RunStatus, file: Path) -> None:
    """Write a status in place of the last one.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, status.model_dump_json(indent=1) + "\n")


def read_status(file: Path) -> RunStatus | None:
    """Return the status of the last run, if it left one."""
    try:
        return RunStatus.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def read_step(log: Path) -> Step | None:
    """Return the last step in a training's log; a line that is still being written is passed over."""
    try:
        with log.open("rb") as file:
            header = file.readline().decode()
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:  # it has not begun, or has ended meanwhile
        return None
    columns = next(csv.reader([header]), [])
    whole = text[: text.rfind("\n") + 1].splitlines()
    for row in csv.reader(reversed(whole)):
        try:
            values = dict(zip(columns, row, strict=True))
            return Step(int(values["step"]), float(values["loss"]))
        except (ValueError, KeyError):
            continue
    return None


def is_current(status: RunStatus | None, holder: Holder) -> bool:
    """Whether a status is of the run that goes on, which may not have written one yet."""
    return status is not None and (status.host, status.pid) == (holder.host, holder.pid)


def get_age(time: str) -> float:
    """Return the seconds since a time."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
