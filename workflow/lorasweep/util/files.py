"""Read and write shared files: atomic writes, JSON records, locks, sizes."""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.util.errors import InputError


def give_default_mode(file: Path) -> None:
    """Give a file the default permissions by the umask; safetensors writes files that only their owner may read."""
    mask = os.umask(0)  # the umask can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_aside(file: Path, text: str) -> None:
    """Write a file atomically: after a crash it has either its old or its new content."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def read_record(file: Path, kind: type) -> dict[str, Any]:
    """Return a record written by `write_record`, whose values are of type `kind`; {} if there is no file.

    Raises:
        InputError: the file is not such a record.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"not the record that lorasweep writes ({error}); restore or remove it", file=file) from error
    if not isinstance(record, dict) or not all(isinstance(value, kind) for value in record.values()):
        raise InputError("not the record that lorasweep writes; restore or remove it", file=file)
    return record


def find_record(file: Path) -> dict[str, Any]:
    """Return a record; {} if it is missing or not readable, for example truncated by a full disk."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_record(file: Path, record: Mapping[str, Any], *, sorts: bool = True) -> None:
    """Write a record as JSON, atomically; its keys are sorted, or stay in their order. Its folder is made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps(record, indent=1, sort_keys=sorts) + "\n")


def end_last_line(file: Path) -> None:
    """Add a missing line break at the end of a file, so that an appended row begins on a new line."""
    with file.open("a+b") as last:
        if last.tell() and last.seek(-1, os.SEEK_END) and last.read() != b"\n":
            last.write(b"\n")


def explain_write_failure(folder: Path) -> str:
    """Return the system's error if one megabyte cannot be written to a folder (disk full, quota), else "".

    For programs whose own error messages hide that the disk is full.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1_000_000))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"nothing more can be written to {folder}: {error}"
    return ""


@contextmanager
def hold_alone(file: Path, what: str) -> Iterator[None]:
    """Hold a lock file in this context; print a message and wait while another process holds it.

    `what` is the activity, such as `training x`. The system releases the lock when the process ends, even if it is
    killed. On a file system without locks, print a message and continue without a lock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for a process of an earlier run that is still {what} ...", flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{file}: the file system does not support locks ({error}); continuing without", flush=True)
        yield


def get_size(folder: Path) -> int:
    """Return the total size in bytes of all files below a folder; 0 if it is missing. Files may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def read_tail(log: Path, size: int = 20_000) -> list[str]:
    """Return the last lines of a log, from its last `size` bytes. Each update of a progress bar is a line."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))


def get_state(file: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced or written to: its inode, size and time."""
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
