"""Provenance of results: versions of packages, and the revision of the workflow."""

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_CLONE = Path(__file__).parents[3]


def get_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of the given packages; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@cache
def digest_packages() -> str:
    """Return a digest of the names and versions of all packages in the clone's environments."""
    names = sorted(package.name for package in (_CLONE / ".venv").glob("*/lib/*/site-packages/*.dist-info"))
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


@cache
def get_git_revision() -> str | None:
    """Return the clone's commit, with `-dirty` if tracked files were changed; `None` outside of git."""
    command = ["git", "-C", str(_CLONE), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        output = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False).stdout
    except FileNotFoundError:  # git is not installed
        return None
    return output.strip() or None
