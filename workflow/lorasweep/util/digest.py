"""Digests of files and texts."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path


def digest_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8 in hexadecimal: that of a file with it."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal. Cached per process as long as the file does not change."""
    stat = path.stat()
    return _digest(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def digest_files(paths: Iterable[str | Path]) -> str:
    """Return the sha256 of each file, in order, separated by blanks."""
    return " ".join(digest_file(Path(path)) for path in paths)


@lru_cache
def _digest(path: Path, inode: int, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
