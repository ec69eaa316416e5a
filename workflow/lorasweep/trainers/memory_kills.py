"""Tell whether the previous attempt at a job was killed for running out of memory.

A process that is killed cannot report it. So each attempt keeps a file that says where it runs, and removes the file
when it ends. An attempt that finds such a file asks SLURM about the earlier job, or the machine's kernel.
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
    """The kernel's id of the machine's current boot."""
    oom_kills: int
    """Number of out-of-memory kills on the machine since boot, at the attempt's start; -1 if unknown."""

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
    """Return the attempt that a file describes, or `None` if there is no readable file."""
    try:
        return Attempt(**json.loads(file.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def explain_memory_kill(attempt: Attempt, now: Attempt) -> str:
    """Return the evidence that an attempt was killed for running out of memory, or "" if there is none.

    Attempts that were requeued, or ended by a time limit or a node failure, do not count. The kernel counts kills on
    the whole machine. An increase since the attempt's start is taken as evidence, but only outside of SLURM.
    """
    if attempt.slurm_job and attempt.slurm_job != now.slurm_job:
        return find_memory_kill(attempt.slurm_job)
    is_same_machine = (attempt.host, attempt.boot) == (now.host, now.boot)
    if not attempt.slurm_job and is_same_machine and 0 <= attempt.oom_kills < now.oom_kills:
        return "the kernel has since killed a process of this machine that ran out of memory (oom_kill in /proc/vmstat)"
    return ""


def _count_oom_kills() -> int:
    try:
        counts = dict(line.split() for line in _STATISTICS.read_text(encoding="utf-8").splitlines())
        return int(counts["oom_kill"])
    except (OSError, KeyError, ValueError):
        return -1
