"""What is seen of a run: when each attempt of a job begins and ends, and how much of what lies on disk is temporary."""

import logging
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lorasweep.job_records import CANCELLED, DONE, FAILED
from lorasweep.layout import STATE, get_stage
from lorasweep.room import get_size

TEMPORARY = ("merged", ".hf_model.partial", ".adapter.partial", STATE)
"""What of a point's folder goes away."""

_SUBMITTED = re.compile(r"Job (\d+) has been submitted with SLURM jobid (\d+)")


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job."""

    rule: str
    name: str
    """The point's or the batch's; nothing for a job of the whole sweep."""
    state: str
    seconds: float
    slurm_job: str | None


@dataclass(frozen=True)
class Running:
    """An attempt that goes on."""

    rule: str
    name: str
    seconds: float
    """Since its start; of a scheduler's job since its submission."""
    slurm_job: str | None


class JobWatcher(logging.Handler):
    """Listens to Snakemake's messages for the starts and ends of jobs."""

    def __init__(self) -> None:
        super().__init__()
        self._jobs: dict[int, tuple[str, str]] = {}
        self._started: dict[int, float] = {}
        self._submitted: dict[int, str] = {}
        self.attempts: list[Attempt] = []

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        said = record.__dict__
        if event == "job_info":
            name = next(iter((said.get("wildcards") or {}).values()), "")
            self._jobs[said["jobid"]] = (get_stage(said["rule_name"]), str(name))
        elif event == "job_started":
            for job in said["jobs"]:
                self._started[job] = time.monotonic()
        elif event == "job_finished":
            self._end(said["job_id"], DONE)
        elif event == "job_error":
            self._end(said["jobid"], FAILED)
        elif submitted := _SUBMITTED.search(record.getMessage() if record.msg else ""):
            self._submitted[int(submitted[1])] = submitted[2]

    def list_running(self) -> list[Running]:
        """Return what goes on, the longest first; another thread may ask."""
        now = time.monotonic()
        return [
            Running(*self._jobs[job], now - began, self._submitted.get(job))
            for job, began in list(self._started.items())
            if job in self._jobs
        ]

    def end_all(self) -> None:
        """Take what still runs for cancelled: the run has ended without it."""
        for job in list(self._started):
            self._end(job, CANCELLED)

    def _end(self, job: int, state: str) -> None:
        began = self._started.pop(job, None)
        if began is not None and job in self._jobs:
            rule, name = self._jobs[job]
            seconds = time.monotonic() - began
            self.attempts.append(Attempt(rule, name, state, seconds, self._submitted.pop(job, None)))


def measure_temporary(results: Path, points: Iterable[str]) -> int:
    """Return the bytes of what goes away of some points, some of which need not have begun."""
    total = 0
    for point in points:
        folder = results / point
        try:
            there = {entry.name for entry in os.scandir(folder)} & set(TEMPORARY)
        except OSError:
            continue
        total += sum(get_size(folder / name) for name in there)
    return total
