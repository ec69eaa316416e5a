"""What is seen of a run: when each attempt of a job begins and ends, and how much of what lies on disk is temporary."""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.layout import STATE
from lorasweep.planning.history import CANCELLED, DONE, FAILED
from lorasweep.util.files import get_size, read_tail
from lorasweep.util.slurm import MEMORY_KILL

TEMPORARY = ("merged", ".hf_model.partial", ".adapter.partial", STATE)
"""What of the folder of a point or a training goes away."""

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

    def __init__(self, trainings: Mapping[str, str]) -> None:
        """`trainings` gives the points for which trainings are counted, by the trainings' names."""
        super().__init__()
        self._trainings = trainings
        self._jobs: dict[int, tuple[str, str]] = {}
        self._started: dict[int, float] = {}
        self._submitted: dict[int, str] = {}
        self.attempts: list[Attempt] = []

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        said = record.__dict__
        if event == "job_info":
            name = str(next(iter((said.get("wildcards") or {}).values()), ""))
            self._jobs[said["jobid"]] = (said["rule_name"], self._trainings.get(name, name))
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


def measure_temporary(results: Path, folders: Iterable[str]) -> int:
    """Return the bytes of what goes away of the folders of points and trainings, some of which need not be there."""
    total = 0
    for name in folders:
        folder = results / name
        try:
            there = {entry.name for entry in os.scandir(folder)} & set(TEMPORARY)
        except OSError:
            continue
        total += sum(get_size(folder / part) for part in there)
    return total


_MEMORY = "SLURM ended it for its memory; more: --set-resources RULE:mem_mb=MB, or --retries 1"

# What to look for in a log, and what to say of it; the first that is found is the reason.
_REASONS = {
    r"CUBLAS_STATUS_ALLOC_FAILED": "the GPU's memory was not enough",
    r"No space left on device|StorageFull": "the disk is full",
    r"Disk quota exceeded|QuotaExceeded": "the disk quota is used up",
    r"CUDA out of memory|CUDA error: out of memory": "the GPU's memory was not enough",
    MEMORY_KILL: _MEMORY,
}


@dataclass(frozen=True)
class Failure:
    """A job that failed, in its last attempt."""

    rule: str
    point: str
    reason: str
    log: Path


class FailureRecorder(logging.Handler):
    """Listens to Snakemake's messages for jobs that fail, and for those that a retry mends.

    Snakemake's own messages scroll by; and of a job that a scheduler killed, they alone say why.
    """

    def __init__(self, logs: Path, trainings: Mapping[str, str]) -> None:
        """`trainings` gives the points for which trainings are counted, by the trainings' names."""
        super().__init__()
        self._logs = logs
        self._trainings = trainings
        self._by_job: dict[int, Failure] = {}

    @property
    def failures(self) -> list[Failure]:
        return list(self._by_job.values())

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        if event == "job_finished":
            self._by_job.pop(record.__dict__["job_id"], None)
        elif event == "job_error":
            said = record.__dict__
            logs = [Path(str(file)) for file in said["log"]]
            log = next((file for file in logs if file.is_relative_to(self._logs)), None)
            if log:
                others = [file for file in logs if file != log]
                reason = find_reason(log, str(said["rule_msg"] or ""), others)
                name = _name_of(log, self._logs)
                self._by_job[said["jobid"]] = Failure(said["rule_name"], self._trainings.get(name, name), reason, log)


def find_reason(log: Path, message: str, others: Iterable[Path] = ()) -> str:
    """Return why a job failed, in a line: by its log, by the scheduler's, or by what the scheduler said of it."""
    state = re.search(r"SLURM status is: '(\w+)", message)
    killed = {
        "TIMEOUT": "SLURM ended it at its time limit; more: --set-resources RULE:runtime=MINUTES, or --retries 1",
        "OUT_OF_MEMORY": _MEMORY,
        "CANCELLED": "it was cancelled",
        "NODE_FAIL": "its node failed",
    }
    if state and state[1] in killed:
        return killed[state[1]]
    lines = [line.strip() for line in read_tail(log) if line.strip()]
    for line in reversed([line for file in others for line in read_tail(file)] + lines):
        for pattern, reason in _REASONS.items():
            if re.search(pattern, line):
                return f"{reason} ({line.strip()[:120]})"
    if lines:
        return lines[-1][:200]
    return f"SLURM says {state[1]}" if state else "it left no word"


def _name_of(log: Path, logs: Path) -> str:
    """A job of a point, a training or a batch logs to `<rule>/<name>.log`, one of the whole sweep to `<rule>.log`."""
    return log.name.removesuffix(".log") if log.parent != logs else ""
