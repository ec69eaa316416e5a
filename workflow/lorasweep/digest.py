"""Digests of files."""

import hashlib
from functools import lru_cache
from pathlib import Path


@lru_cache
def digest_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal; read once a process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
