"""Whether a sweep has room: free space, the user's quota, and the experiment's own limit."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.util.files import get_size
from lorasweep.util.formats import GB

KIB = 1024

MARGIN = 1.02
"""More than the plan says is wanted by so much: file systems round up, and logs grow."""


@dataclass(frozen=True)
class Room:
    """How much may still be written, and what says so."""

    free_bytes: int
    limit: str


def find_room(folder: Path, limit_gb: float | None) -> list[Room]:
    """Return every limit that holds for a folder, which need not exist yet.

    Asked are the file system, `lfs quota` and `quota` where these commands are installed and answer, and the limit that
    the experiment sets itself, less what its folder holds.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    rooms = [Room(shutil.disk_usage(there).free, f"the file system of {there}")]
    user = str(os.getuid())
    if (
        shutil.which("lfs")
        and (free := parse_lfs_quota(_ask("lfs", "quota", "-q", "-u", user, str(there)))) is not None
    ):
        rooms.append(Room(free, f"the user's quota on {there} (lfs quota)"))
    if shutil.which("quota"):
        source = _find_source(there)
        free = parse_quota(_ask("quota", "-w", "-p", "-u", user)).get(source)
        if free is not None:
            rooms.append(Room(free, f"the user's quota on {source} (quota)"))
    if limit_gb is not None:
        rooms.append(Room(int(limit_gb * GB) - get_size(folder), f"plan.storage_limit_gb: {limit_gb:g}"))
    return rooms


def explain_shortage(rooms: Iterable[Room], need: int, parallel: int, others: Mapping[str, int]) -> str | None:
    """Return what to say where there is less room than is needed, with what would fit; else nothing.

    `parallel` is the number of jobs at a time that the need is of; `others` are what else could be done, and the bytes
    that it needs.
    """
    short = [room for room in rooms if room.free_bytes < need * MARGIN]
    if not short:
        return None
    tightest = min(short, key=lambda room: room.free_bytes)
    fitting = [f"{name} ({size / GB:,.2f} GB)" for name, size in others.items() if size * MARGIN <= tightest.free_bytes]
    free = max(0, tightest.free_bytes) / GB
    fits = ", or ".join(fitting) or "nothing of this sweep"
    return (
        f"not enough room: this run needs {need / GB:,.2f} GB at its peak with {parallel} jobs at a time "
        f"(plan.parallel_jobs), and {free:,.2f} GB are free by {tightest.limit}; what would fit: {fits}. To run all "
        "the same: --config force_plan=true"
    )


def parse_lfs_quota(lines: Iterable[str]) -> int | None:
    """Return the bytes that `lfs quota -q -u USER PATH` leaves: path, KiB used, soft limit, hard limit, ..."""
    words = " ".join(lines).split()
    return _left(words[1:4])


def parse_quota(lines: Iterable[str]) -> dict[str, int]:
    """Return the bytes that `quota -w -p` leaves, by file system: its name, KiB used, soft limit, hard limit, ..."""
    found = {}
    for line in lines:
        words = line.split()
        left = _left(words[1:4])
        if left is not None:
            found[words[0]] = left
    return found


def _left(words: list[str]) -> int | None:
    """A star follows what is over its limit; a limit of 0 is none. The soft limit counts: over it, a clock runs."""
    try:
        used, *limits = (int(word.rstrip("*")) for word in words)
    except ValueError:
        return None
    set_limits = [limit for limit in limits if limit]
    return (min(set_limits) - used) * KIB if set_limits else None


def _find_source(folder: Path) -> str:
    """The file system that a folder lies on, as the kernel names it (/proc/mounts)."""
    best, source = "", ""
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        name, mount = line.split()[:2]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, source = mount, name
    return source


def _ask(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.splitlines()
