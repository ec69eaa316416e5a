"""Check that a sweep fits on disk: free space, the user's quota, and the experiment's own limit."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasweep.util.files import get_size
from lorasweep.util.formats import GB, format_bytes

KIB = 1024

MARGIN = 1.02
"""Factor by which free space must exceed the planned bytes: file systems round up, and logs grow."""


@dataclass(frozen=True)
class Room:
    """The bytes that may still be written under one limit."""

    free_bytes: int
    limit: str
    """The limit's description, for messages."""


def find_room(folder: Path, limit_gb: float | None) -> list[Room]:
    """Return the room under every limit that applies to a folder, which need not exist yet.

    The limits are: free space of the file system; `lfs quota` and `quota`, where these commands work; and the
    experiment's own limit, minus the folder's present size.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    rooms = [Room(shutil.disk_usage(existing).free, f"the file system of {existing}")]
    user = str(os.getuid())
    if (
        shutil.which("lfs")
        and (free := parse_lfs_quota(_ask("lfs", "quota", "-q", "-u", user, str(existing)))) is not None
    ):
        rooms.append(Room(free, f"the user's quota on {existing} (lfs quota)"))
    if shutil.which("quota"):
        source = _find_source(existing)
        free = parse_quota(_ask("quota", "-w", "-p", "-u", user)).get(source)
        if free is not None:
            rooms.append(Room(free, f"the user's quota on {source} (quota)"))
    if limit_gb is not None:
        rooms.append(Room(int(limit_gb * GB) - get_size(folder), f"plan.storage_limit_gb: {limit_gb:g}"))
    return rooms


def explain_shortage(rooms: Iterable[Room], need: int, parallel: int, alternatives: Mapping[str, int]) -> str | None:
    """Return a message if a limit leaves less than `need` bytes, with the alternatives that would fit; else `None`.

    `need` was planned for `parallel` jobs at a time. `alternatives` has the bytes that other ways of keeping
    checkpoints need, by their names.
    """
    short = [room for room in rooms if room.free_bytes < need * MARGIN]
    if not short:
        return None
    tightest = min(short, key=lambda room: room.free_bytes)
    fitting = [
        f"{name} ({format_bytes(size)})" for name, size in alternatives.items() if size * MARGIN <= tightest.free_bytes
    ]
    free = format_bytes(max(0, tightest.free_bytes))
    fits = ", or ".join(fitting) or "no mode of this sweep"
    return (
        f"not enough disk space: this run needs {format_bytes(need)} at its peak with {parallel} jobs at a time "
        f"(plan.parallel_jobs), and {free} are free ({tightest.limit}); what would fit: {fits}. To run it "
        "anyway: --config force_plan=true"
    )


def parse_lfs_quota(lines: Iterable[str]) -> int | None:
    """Return the free bytes by the output of `lfs quota -q -u USER PATH`; `None`: no limit.

    The output is: path, KiB used, soft limit, hard limit, ...
    """
    words = " ".join(lines).split()
    return _get_free_bytes(words[1:4])


def parse_quota(lines: Iterable[str]) -> dict[str, int]:
    """Return the free bytes of each file system that has a limit, by the output of `quota -w -p`.

    A line of the output is: file system, KiB used, soft limit, hard limit, ...
    """
    free_bytes = {}
    for line in lines:
        words = line.split()
        free = _get_free_bytes(words[1:4])
        if free is not None:
            free_bytes[words[0]] = free
    return free_bytes


def _get_free_bytes(words: list[str]) -> int | None:
    """Return the free bytes by KiB used, soft limit and hard limit; `None`: no limit, or no numbers.

    `quota` marks exceeded usage with a star, and writes 0 for no limit. The soft limit counts: exceeding it starts the
    grace period.
    """
    try:
        used, *limits = (int(word.rstrip("*")) for word in words)
    except ValueError:
        return None
    set_limits = [limit for limit in limits if limit]
    return (min(set_limits) - used) * KIB if set_limits else None


def _find_source(folder: Path) -> str:
    """Return the name of the file system that holds a folder, as in /proc/mounts."""
    best, source = "", ""
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        name, mount = line.split()[:2]
        if folder.resolve().is_relative_to(mount) and len(mount) >= len(best):
            best, source = mount, name
    return source


def _ask(*command: str) -> list[str]:
    try:
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return result.stdout.splitlines()
