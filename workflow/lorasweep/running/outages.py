"""Tell of SLURM's outages, which its commands wait out, and of why jobs wait."""

import contextlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import psutil

from lorasweep.util.files import find_record
from lorasweep.util.formats import format_seconds
from lorasweep.util.slurm import LOGGER, ask
from lorasweep.util.slurm_commands import describe_outage, is_limit_reached

_FIRST_SECONDS = 10.0
"""Seconds without an answer after which an outage is told of. It is told again when it has lasted twice as long."""

_STALE_SECONDS = 600.0
"""Seconds after which the record of a command on another machine, which renews it at each try, does not count."""

_SECONDS_BETWEEN_LOOKS = 5.0

_SECONDS_BETWEEN_REASONS = 60.0

NEVER = re.compile(
    r"Partition(Time|Node)Limit|DependencyNeverSatisfied|BadConstraints|Invalid(Account|QOS)|(Account|QOS)NotAllowed"
    r"|(Assoc|QOS)Max\w+Per(Job|Node)"
)
"""SLURM's reasons (`squeue`'s `%r`, src/common/slurm_protocol_defs.c) for which a job as it is will never start."""


class OutageWatcher:
    """Log a line when SLURM stops to answer, ever more seldom while it does not, and when it answers again.

    A limit on the number of jobs, at which a large sweep may be until its end, is told of once.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's folder for SLURM."""
        self._folder = folder / "outages"
        self._since: float | None = None
        self._told = 0.0
        self._is_limit = self._is_limit_told = False
        self.line = ""
        """The present outage; "" if SLURM answers."""

    def start(self) -> None:
        """Look every few seconds in a thread of its own, which ends with the process."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            self.line = self.look()

    def look(self) -> str:
        """Log what is new, and return the present outage as a line; "" if SLURM answers."""
        records = list(self._read())
        if not records:
            if self._since is not None and self._told and not self._is_limit:
                LOGGER.warning(f"SLURM answers again, after {format_seconds(time.time() - self._since)}.")
            self._since, self._told = None, 0.0
            return ""
        first = min(records, key=lambda record: float(record["since"]))
        self._since, self._is_limit = float(first["since"]), is_limit_reached(first["reason"])
        lasted = time.time() - self._since
        line = describe_outage(first | {"tries": sum(int(record["tries"]) for record in records)})
        if lasted > max(_FIRST_SECONDS, 2 * self._told):
            self._told = lasted
            if not (self._is_limit and self._is_limit_told):
                LOGGER.warning(line)
            self._is_limit_told |= self._is_limit
        return line if self._told else ""

    def _read(self) -> Iterator[dict[str, Any]]:
        for file in self._folder.glob("*.json"):
            record = find_record(file)
            if not record:  # it is over
                continue
            # A command that is killed leaves its record.
            is_here = record["host"] == socket.gethostname()
            with contextlib.suppress(OSError):
                if psutil.pid_exists(record["pid"]) if is_here else time.time() - file.stat().st_mtime < _STALE_SECONDS:
                    yield record


class PendingReasons:
    """Ask SLURM, at most once a minute, why jobs are not running. A thread waits for the answer.

    A reason that does not pass is told once.
    """

    def __init__(self) -> None:
        self._asked = -_SECONDS_BETWEEN_REASONS
        self._thread: threading.Thread | None = None
        self._reasons: dict[str, str] = {}
        self._told: set[str] = set()

    def get(self, jobs: Collection[str]) -> dict[str, str]:
        """Return SLURM's last word for why each of these SLURM jobs waits, such as `Resources`, by job."""
        is_due = time.monotonic() - self._asked >= _SECONDS_BETWEEN_REASONS
        if is_due and not (self._thread and self._thread.is_alive()):
            self._asked = time.monotonic()
            self._thread = threading.Thread(target=self._ask, args=[jobs], daemon=True)
            self._thread.start()
        return self._reasons

    def _ask(self, jobs: Collection[str]) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            lines = ask("squeue", "--me", "--noheader", "--states=PENDING", "--format=%i|%r")
            reasons = dict(line.strip().split("|", 1) for line in lines if "|" in line)
            self.note({job: reason for job, reason in reasons.items() if job in jobs})

    def note(self, reasons: dict[str, str]) -> None:
        """Take over SLURM's reasons, and tell of those that do not pass."""
        self._reasons = reasons
        for job, reason in reasons.items():
            if NEVER.match(reason) and job not in self._told:
                self._told.add(job)
                LOGGER.warning(
                    f"SLURM will not start job {job}: {reason}. Change it (scontrol update), or cancel it (scancel) "
                    "and request what its partition, account or QOS allows."
                )
