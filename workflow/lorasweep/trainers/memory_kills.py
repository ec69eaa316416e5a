"""An attempt at a job that may end without a word: its successor asks whether it was killed for its memory.

What is killed so cannot say it. So an attempt leaves a mark for as long as it lasts, with where it runs; who finds a
mark asks SLURM of that job, or the kernel of that machine.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from lorasweep.util.files import write_aside
from lorasweep.util.slurm import find_memory_kill

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STATISTICS = Path("/proc/vmstat")


@dataclass(frozen=True)
class Attempt:
    """Where an attempt runs."""

    recipe_sha256: str
    slurm_job: str | None
    host: str
    boot: str
    """The kernel's name of the machine's last start."""
    oom_kills: int
    """What the kernel had killed on the machine for want of memory when the attempt began; -1 if it does not say."""

    @classmethod
    def of_this_process(cls, recipe_sha256: str) -> "Attempt":
        return cls(
            recipe_sha256=recipe_sha256,
            slurm_job=os.environ.get("SLURM_JOB_ID"),
            host=socket.gethostname(),
            boot=_BOOT.read_text(encoding="utf-8").strip() if _BOOT.is_file() else "",
            oom_kills=_count_oom_kills(),
        )

    def write(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_aside(file, json.dumps(asdict(self)) + "\n")


def read_attempt(file: Path) -> Attempt | None:
    """Return the attempt that left its mark in a file, if one did."""
    try:
        return Attempt(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def explain_memory_kill(attempt: Attempt, now: Attempt) -> str:
    """Return who killed an attempt that left no word for its memory, or nothing where nobody says so.

    What was queued again, or ended at a time limit or with its node, was not. The kernel's count is of a whole machine:
    it counts here where it has grown since the attempt began, and SLURM was not there to say anything else.
    """
    if attempt.slurm_job and attempt.slurm_job != now.slurm_job:
        return find_memory_kill(attempt.slurm_job)
    is_same_machine = (attempt.host, attempt.boot) == (now.host, now.boot)
    if not attempt.slurm_job and is_same_machine and 0 <= attempt.oom_kills < now.oom_kills:
        return "the kernel has killed for want of memory on this machine since (oom_kill in /proc/vmstat)"
    return ""


def _count_oom_kills() -> int:
    try:
        counts = dict(line.split() for line in _STATISTICS.read_text(encoding="utf-8").splitlines())
        return int(counts["oom_kill"])
    except (OSError, KeyError, ValueError):
        return -1
