"""The status of a run: a small file that the run updates regularly and `lorasweep status` shows.

Its size depends on the number of running jobs, not of points. Steps and losses are read from the trainings' own logs.
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
"""Name of the status file in an experiment's folder."""


def get_training_log(training: str) -> str:
    """Return the path of a running training's log, relative to the experiment's folder.

    The log is a CSV file with one row per optimizer step, and columns `step` and `loss` among others.
    """
    return f"{TRAININGS}/{training}/{STATE}/train/{TRAINING_LOG}"


MOST_LISTED = 100
"""Maximum number of running jobs, and of failures, listed in a status."""

WELL, BADLY, INTERRUPTED = "done", "failed", "interrupted"

_LAST_BYTES = 4096


class JobStatus(BaseModel, frozen=True):
    """A job that runs or is queued by a scheduler."""

    rule: str
    name: str
    """Name of the point or batch; empty for a job of the whole experiment."""
    points: int
    """Number of points that the job works on."""
    since: str
    """Time of its start, or of its submission to a scheduler."""
    slurm_job: str | None
    job_log: str = ""
    """Path of the job's log, relative to the experiment's folder. The job makes it as it begins."""
    steps: int | None
    """Total number of optimizer steps of a training."""
    log: str = ""
    """Path of a training's log, relative to the experiment's folder."""
    seconds_left: float | None
    """Estimated seconds left; `None` if not known, for example if the job takes longer than planned."""
    reason: str = ""
    """SLURM's word for why the job waits, such as `Resources`; empty if it runs."""


class FailureStatus(BaseModel, frozen=True):
    """A job whose last attempt failed."""

    rule: str
    point: str
    reason: str
    log: str


class RunStatus(BaseModel, frozen=True):
    """The status of a run. Times are ISO 8601 in UTC."""

    host: str
    pid: int
    """Process id of the run."""
    began: str
    updated: str
    interval_seconds: float
    """Expected seconds until the next update."""
    outcome: str = ""
    """`done`, `failed` or `interrupted`; empty while the run is in progress."""
    points: dict[str, int]
    """Number of points by stage: see lorasweep.running.progress."""
    outage: str = ""
    """That SLURM does not answer, since when and what it says; empty if it answers."""
    jobs: int
    jobs_done: int
    running: list[JobStatus]
    """Running jobs, at most `MOST_LISTED`, longest first."""
    running_jobs: int
    failures: list[FailureStatus]
    """The last failures, at most `MOST_LISTED`."""
    failed_jobs: int
    kept_bytes: int
    planned_kept_bytes: int
    """Planned size of the kept files of all points."""
    temporary_bytes: int
    peak_temporary_bytes: int
    seconds_left: float | None
    """Estimated seconds left; `None` after the end of the run, and if not known."""
    planned_wall_seconds: float
    error: float | None
    """Ratio of measured to planned time of the jobs so far; `None` if no job is done."""


@dataclass(frozen=True)
class Step:
    """A step of a training."""

    step: int
    loss: float


def write_status(status: RunStatus, file: Path) -> None:
    """Write a status, replacing the previous one.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, status.model_dump_json(indent=1) + "\n")


def read_status(file: Path) -> RunStatus | None:
    """Return the status of the last run, or `None` if there is no readable status file."""
    try:
        return RunStatus.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def read_step(log: Path) -> Step | None:
    """Return the last complete step in a training's log, or `None` if there is no complete row."""
    try:
        with log.open("rb") as file:
            header = file.readline().decode()
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:  # the training has not begun, or has ended meanwhile
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
    """Whether a status was written by the current holder, which may not have written one yet."""
    return status is not None and (status.host, status.pid) == (holder.host, holder.pid)


def get_age(time: str) -> float:
    """Return the seconds since an ISO 8601 time."""
    return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
