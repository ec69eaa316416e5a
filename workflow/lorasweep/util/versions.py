"""What a number was made with: versions of packages, and the revision of the workflow."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def get_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of those of the packages that are installed here."""
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def get_git_revision(directory: Path) -> str | None:
    """Return the commit that is checked out, with `-dirty` where tracked files differ; `None` outside of git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    except FileNotFoundError:  # no git here
        return None
    return found.stdout.strip() or None
