"""The holder of a sweep: the process that runs it.

Snakemake's lock does not name its process, and stays when that process dies. So a run writes a holder file beside the
results and removes it at its end. The next run reads it.
"""

import getpass
import os
import shutil
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ValidationError

from lorasweep.util.files import write_aside


class Holder(BaseModel):
    """A process that runs a sweep."""

    host: str
    user: str
    pid: int
    started: float
    """Start time of the process, in seconds since 1970. Process ids alone are reused."""
    slurm_runs: list[str] = []
    """SLURM job names of this run, and of earlier runs whose trainings it waits for."""
    given_up: bool = False
    """Whether the user has declared the process dead with `--unlock`."""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).isoformat(sep=" ", timespec="minutes")
        return f"{self.user} on {self.host} (process {self.pid}, since {since})"

    @property
    def is_here(self) -> bool:
        """Whether the process runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to have ended. On another machine, only the user can tell (`--unlock`)."""
        if self.given_up:
            return True
        if not self.is_here:
            return False
        try:
            started: float = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return True
        return abs(started - self.started) > 1


def hold(file: Path, slurm_runs: list[str]) -> None:
    """Write a holder file for this process."""
    process = psutil.Process()
    holder = Holder(
        host=socket.gethostname(),
        user=_user(),
        pid=process.pid,
        started=process.create_time(),
        slurm_runs=slurm_runs,
    )
    _write(holder, file)


def give_up(file: Path) -> None:
    """Mark the holder as dead. Its run ids stay on record, so that its SLURM jobs can be found."""
    holder = read_holder(file)
    if holder:
        _write(holder.model_copy(update={"given_up": True}), file)


def release(file: Path) -> None:
    """Remove the holder file if it is that of this process."""
    holder = read_holder(file)
    if holder and holder.is_here and holder.pid == os.getpid():
        file.unlink(missing_ok=True)


def read_holder(file: Path) -> Holder | None:
    """Return the holder, or `None` if there is no readable holder file."""
    try:
        return Holder.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def remove_locks(locks: Path, results: str) -> bool:
    """Remove Snakemake's locks on the files of an experiment; return whether there were any."""
    files = list(_find_locks(locks, results))
    for lock in files:
        lock.unlink(missing_ok=True)
    if files and not any(locks.iterdir()):
        shutil.rmtree(locks)
    return bool(files)


def _write(holder: Holder, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, holder.model_dump_json() + "\n")


def _find_locks(locks: Path, results: str) -> Iterator[Path]:
    """Yield the lock files of an experiment.

    A lock file lists the locked paths, one per line. A run has two with the same number: for inputs and for outputs.
    """
    numbers = {
        lock.name.partition(".")[0]
        for lock in locks.glob("*.lock")
        if any(line.startswith(f"{results}/") for line in lock.read_text(encoding="utf-8").splitlines())
    }
    for number in numbers:
        yield from locks.glob(f"{number}.*.lock")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return str(os.getuid())
