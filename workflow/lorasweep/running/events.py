"""Observe a run: the start, end and failure of each job, and the size of its temporary files."""

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.layout import LAST_EPOCH, MERGED, RUNGS, STATE
from lorasweep.planning.history import CANCELLED, DONE, FAILED
from lorasweep.util import errors
from lorasweep.util.files import get_size, read_tail
from lorasweep.util.slurm import MEMORY_KILL

TEMPORARY = (".adapter.partial", STATE, RUNGS)
"""Temporary files and folders in the folder of a point or a training.

A full model that is being written is none: it will be kept, and is planned so.
"""

_SUBMITTED = re.compile(r"Job (\d+) has been submitted with SLURM jobid (\d+)")
_REFUSED = re.compile(
    r"SLURM sbatch failed\. The error message was '(.*?)'\.\n|Job submission failed with exception: (.*)", re.DOTALL
)
_WITHOUT_OUTPUT = re.compile(r"Job (\d+)\s+completed successfully, but some output files are missing")


def find_failed_job(record: logging.LogRecord) -> int | None:
    """Return Snakemake's id of the job that failed according to a message; `None` for other messages.

    Of a job that ended well, but whose output files did not appear, Snakemake has only a text.
    """
    if str(getattr(record, "event", "")) == "job_error":
        return int(record.__dict__["jobid"])
    missing = _WITHOUT_OUTPUT.search(record.getMessage()) if record.msg else None
    return int(missing[1]) if missing else None


@dataclass(frozen=True)
class Attempt:
    """One attempt of a job."""

    rule: str
    name: str
    """Name of the point or batch; empty for a job of the whole experiment."""
    state: str
    seconds: float
    slurm_job: str | None


@dataclass(frozen=True)
class Running:
    """A running attempt."""

    rule: str
    name: str
    seconds: float
    """Seconds since its start; for a SLURM job, since its submission."""
    slurm_job: str | None
    log: str = ""
    """Path of its log, which it makes as it begins; empty if it has none."""


class JobWatcher(logging.Handler):
    """Record the starts and ends of jobs from Snakemake's log messages."""

    def __init__(self, trainings: Mapping[str, str]) -> None:
        """`trainings` maps the name of a training to the point that it is counted for."""
        super().__init__()
        self._trainings = trainings
        self._jobs: dict[int, tuple[str, str]] = {}
        self._logs: dict[int, str] = {}
        self._started: dict[int, float] = {}
        self._submitted: dict[int, str] = {}
        self.attempts: list[Attempt] = []

    def emit(self, record: logging.LogRecord) -> None:
        event = str(getattr(record, "event", ""))
        fields = record.__dict__
        if event == "job_info":
            name = str(next(iter((fields.get("wildcards") or {}).values()), ""))
            self._jobs[fields["jobid"]] = (fields["rule_name"], self._trainings.get(name, name))
            self._logs[fields["jobid"]] = str(next(iter(fields["log"]), ""))
        elif event == "job_started":
            for job in fields["jobs"]:
                self._started[job] = time.monotonic()
        elif event == "job_finished":
            self._end(fields["job_id"], DONE)
        elif (job := find_failed_job(record)) is not None:
            self._end(job, FAILED)
        elif submitted := _SUBMITTED.search(record.getMessage() if record.msg else ""):
            self._submitted[int(submitted[1])] = submitted[2]

    def list_running(self) -> list[Running]:
        """Return the running attempts, longest first. Safe to call from another thread."""
        now = time.monotonic()
        return [
            Running(*self._jobs[job], now - began, self._submitted.get(job), self._logs[job])
            for job, began in list(self._started.items())
            if job in self._jobs
        ]

    def end_all(self) -> None:
        """Mark all running attempts as cancelled, since the run has ended."""
        for job in list(self._started):
            self._end(job, CANCELLED)

    def _end(self, job: int, state: str) -> None:
        began = self._started.pop(job, None)
        if began is not None and job in self._jobs:
            rule, name = self._jobs[job]
            seconds = time.monotonic() - began
            self.attempts.append(Attempt(rule, name, state, seconds, self._submitted.pop(job, None)))


def measure_temporary(results: Path, folders: Iterable[str]) -> int:
    """Return the size in bytes of the merged models, and of the temporary files in folders of points and trainings.

    Missing folders count 0, and so do merged models that are elsewhere.
    """
    merged = results / MERGED
    total = 0 if merged.parent.is_symlink() else get_size(merged)
    for name in folders:
        folder = results / name
        try:
            names = {entry.name for entry in os.scandir(folder)}
        except OSError:
            continue
        epochs = {name for name in names if name.startswith("epoch=")} if LAST_EPOCH in names else set()
        names = names & set(TEMPORARY) | epochs
        total += sum(get_size(folder / part) for part in names)
    return total


_REASON_BYTES = 50_000
"""Bytes at the end of a log that may hold the reason."""

_MEMORY = "SLURM killed it for running out of memory; for more: --set-resources RULE:mem_mb=MB, or --retries 1"

# Patterns to look for in a log, with the reason to report. The first match counts.
_REASONS = {
    r"CUBLAS_STATUS_ALLOC_FAILED": "the GPU's memory was not enough",
    r"No space left on device|StorageFull": "the disk is full",
    r"Disk quota exceeded|QuotaExceeded": "the disk quota is used up",
    r"CUDA out of memory|CUDA error: out of memory": "the GPU's memory was not enough",
    MEMORY_KILL: _MEMORY,
}


@dataclass(frozen=True)
class Failure:
    """A job whose last attempt failed."""

    rule: str
    point: str
    reason: str
    log: Path


class FailureRecorder(logging.Handler):
    """Record failed jobs from Snakemake's log messages; drop those that a retry completes.

    Snakemake's messages scroll by, and only they tell why a scheduler killed a job.
    """

    def __init__(self, logs: Path, trainings: Mapping[str, str]) -> None:
        """`trainings` maps the name of a training to the point that it is counted for."""
        super().__init__()
        self._logs = logs
        self._trainings = trainings
        self._started: dict[int, tuple[str, list[Path]]] = {}  # rule and logs
        self._by_job: dict[int, Failure] = {}

    @property
    def failures(self) -> list[Failure]:
        return list(self._by_job.values())

    def emit(self, record: logging.LogRecord) -> None:
        event, fields = str(getattr(record, "event", "")), record.__dict__
        failed = find_failed_job(record)
        if event in ("job_info", "job_error"):
            self._started[fields["jobid"]] = fields["rule_name"], [Path(str(file)) for file in fields["log"]]
        if event == "job_finished":
            self._by_job.pop(fields["job_id"], None)
        elif failed is not None and failed in self._started:
            rule, logs = self._started[failed]
            log = next((file for file in logs if file.is_relative_to(self._logs)), None)
            if log:
                if event == "job_error":
                    scheduler_logs = [file for file in logs if file != log]
                    reason = find_reason(log, str(fields["rule_msg"] or ""), scheduler_logs)
                else:
                    reason = "it ended without an error, but not all of its output files appeared"
                name = _name_of(log, self._logs)
                point = self._trainings.get(name, name)
                self._by_job[failed] = Failure(rule, point, reason, log)


def find_reason(log: Path, message: str, scheduler_logs: Iterable[Path] = ()) -> str:
    """Return the whole reason why a job failed: from its logs, or from the state that SLURM reports."""
    if refused := _REFUSED.search(message):
        return f"SLURM did not take it: {(refused[1] or refused[2]).strip()}"
    state = re.search(r"SLURM status is: '(\w+)", message)
    killed = {
        "TIMEOUT": "SLURM ended it at its time limit; for more: --set-resources RULE:runtime=MINUTES, or --retries 1",
        "OUT_OF_MEMORY": _MEMORY,
        "CANCELLED": "it was cancelled",
        "NODE_FAIL": "its node failed",
    }
    if state and state[1] in killed:
        return killed[state[1]]
    lines = [line.rstrip() for line in read_tail(log, _REASON_BYTES) if line.strip()]
    told = errors.find_reason(lines)
    for line in reversed([line for file in scheduler_logs for line in read_tail(file)] + lines):
        for pattern, reason in _REASONS.items():
            if re.search(pattern, line):
                line = line.strip()
                return f"{reason} ({told})" if line in told else "\n".join(filter(None, [f"{reason} ({line})", told]))
    if lines:
        return told or lines[-1].strip()
    return f"SLURM reports {state[1]}" if state else "no reason found in its log"


def _name_of(log: Path, logs: Path) -> str:
    """Return the name in `<rule>/<name>.log`; "" for `<rule>.log`, the log of a job of the whole experiment."""
    return log.name.removesuffix(".log") if log.parent != logs else ""
