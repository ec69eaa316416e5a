"""Who runs a sweep. Snakemake's lock says that somebody does, not who, and stays when that process dies.

So a run leaves its name beside the results for as long as it lasts, and the next one reads it.
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
    """When the process started, in seconds since 1970: a process id alone is given again after a reboot."""
    slurm_runs: list[str] = []
    """By what names its jobs, and those that an earlier run left to it, are known to SLURM."""
    given_up: bool = False
    """Whether a person has said that it is gone (`--unlock`)."""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).isoformat(sep=" ", timespec="minutes")
        return f"{self.user} on {self.host} (process {self.pid}, since {since})"

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; of another machine's processes only a person can tell."""
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
    """Leave this process's name in a file."""
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
    """Note that the holder is gone, wherever he ran; what he left on SLURM can still be found by his name."""
    holder = read_holder(file)
    if holder:
        _write(holder.model_copy(update={"given_up": True}), file)


def release(file: Path) -> None:
    """Remove the file, if it is this process's."""
    holder = read_holder(file)
    if holder and holder.is_here and holder.pid == os.getpid():
        file.unlink(missing_ok=True)


def read_holder(file: Path) -> Holder | None:
    """Return who left his name, if anybody did."""
    try:
        return Holder.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):
        return None


def remove_locks(locks: Path, results: str) -> bool:
    """Remove Snakemake's locks on the files of an experiment; return whether there were any."""
    found = list(_find_locks(locks, results))
    for lock in found:
        lock.unlink(missing_ok=True)
    if found and not any(locks.iterdir()):
        shutil.rmtree(locks)
    return bool(found)


def _write(holder: Holder, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, holder.model_dump_json() + "\n")


def _find_locks(locks: Path, results: str) -> Iterator[Path]:
    """A lock is a file with the paths that it locks, one a line; a run has one for outputs and one for inputs."""
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
