"""Files that others read, and that only one process at a time may write."""

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
    """Give a file the permissions that the umask leaves to new ones: safetensors' are their owner's alone."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def write_aside(file: Path, text: str) -> None:
    """Write a file so that it is there whole or, whatever happens, as it was."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def read_record(file: Path, kind: type) -> dict[str, Any]:
    """Return a record that `write_record` wrote, with values of a kind; an empty one where there is no file.

    Raises:
        InputError: the file holds something else.
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
    """Return a record, or an empty one where there is none that is whole: a full disk can cut one short."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record as JSON, whole or not at all; make its folder if it is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps(record, indent=1, sort_keys=True) + "\n")


def end_last_line(file: Path) -> None:
    """End a line that a crash cut short, so that what is appended begins a line of its own."""
    with file.open("a+b") as last:
        if last.tell() and last.seek(-1, os.SEEK_END) and last.read() != b"\n":
            last.write(b"\n")


def explain_write_failure(folder: Path) -> str:
    """Return what the system says when a megabyte cannot be written to a folder (disk full, quota), or nothing.

    For programs that fail on a full disk in words of their own.
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
    """Hold a lock file while `what` is done; wait, and say so, while another process of whatever run holds it.

    The lock ends with the process, however it ends. Where the file system has no locks, none is held, and that is said.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(
                f"Another process still does this ({what}), left by an earlier run; waiting for its end ...", flush=True
            )
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            print(f"{file}: the file system has no locks ({error}); going on without", flush=True)
        yield


def get_size(folder: Path) -> int:
    """Return the bytes of all files below a folder; of one that is not there, 0. Files may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_size
            except FileNotFoundError:
                continue
    return total


def read_tail(log: Path, size: int = 20_000) -> list[str]:
    """Return the last lines of a log, progress bars as lines of their own."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))
