"""What a run says at its end: what is done, what failed and why, and how to go on."""

import json
import logging
import re
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from lorasweep.files import write_aside
from lorasweep.layout import get_stage
from lorasweep.slurm import MEMORY_KILL

_MEMORY = "SLURM ended it for its memory; more: --set-resources RULE:mem_mb=MB, or --retries 1"

# What to look for in a log, and what to say of it; the first that is found is the reason.
_REASONS = {
    r"CUBLAS_STATUS_ALLOC_FAILED": "the GPU's memory was not enough",
    r"No space left on device|StorageFull": "the disk is full",
    r"Disk quota exceeded|QuotaExceeded": "the disk quota is used up",
    r"CUDA out of memory|CUDA error: out of memory": "the GPU's memory was not enough",
    MEMORY_KILL: _MEMORY,
}

_LAST_LINES = 5


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

    def __init__(self, logs: Path) -> None:
        super().__init__()
        self._logs = logs
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
                rule = get_stage(said["rule_name"])
                self._by_job[said["jobid"]] = Failure(rule, _point_of(log, self._logs), reason, log)


def write_failures(failures: Iterable[Failure], file: Path) -> None:
    """Write failures as a list of `rule`, `point` (or batch; nothing for a job of the whole sweep), `reason`, `log`."""
    content = [asdict(failure) | {"log": str(failure.log)} for failure in failures]
    write_aside(file, json.dumps(content, indent=1) + "\n")


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


def read_tail(log: Path, size: int = 20_000) -> list[str]:
    """Return the last lines of a log, progress bars as lines of their own."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))


def summarise(
    results: Path,
    points: Iterable[str],
    unfinished: Collection[str],
    failures: Iterable[Failure],
    command: str,
) -> str:
    """Return what a person reads at the end of a run.

    `unfinished` are the points of jobs that this run was to do and did not, some of which failed. A point is done when
    it has its manifest, and is none of them.
    """
    failed: dict[str, Failure] = {}
    for failure in failures:
        failed.setdefault(failure.point, failure)
    names = list(points)
    whole = [name for name in names if (results / name / "manifest.json").is_file()]
    done = [name for name in whole if name not in failed and name not in unfinished]
    waiting = [name for name in names if name not in failed and name not in done]
    count = len(names) - len(done) - len(waiting)  # of points; a job of several is none
    lines = [f"{results.name}: {len(done)} of {len(names)} points done, {count} failed, {len(waiting)} not finished"]
    for failure in failed.values():
        where = f"{failure.rule} of {failure.point}" if failure.point else failure.rule
        lines += [f"  failed: {where}: {failure.reason}", f"    its log: {failure.log}"]
        tail = [line for line in read_tail(failure.log) if line.strip()][-_LAST_LINES:]
        lines += [f"    | {line[:160]}" for line in tail]
    if failed or waiting:
        lines.append(f"To go on with what is missing: {command}")
    return "\n".join(lines)


def _point_of(log: Path, logs: Path) -> str:
    """A job of a point logs to `<rule>/<point>.log`, one of the whole sweep to `<rule>.log`."""
    return log.name.removesuffix(".log") if log.parent != logs else ""
