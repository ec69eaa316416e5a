"""Which points one job evaluates on one loaded base model (mode B2).

A point keeps its batch as long as its evaluation stands: then Snakemake sees the same inputs and has nothing to do.
Points without one are put together anew, those that are trained first, so that none waits for a training that fails
again and again.
"""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path

from lorasweep.util.files import read_record, write_record


def assign_batches(
    points: Sequence[str], done: Collection[str], trained: Collection[str], size: int, record: Path
) -> dict[str, list[str]]:
    """Return the batches of at most `size` points: names of points by the batch's name.

    `done` are the points whose evaluation stands, `trained` those whose adapter does; `record` is the experiment's
    `batches.json`, which need not exist yet.
    """
    known = {point: batch for batch, members in read_batches(record).items() for point in members}
    batches: dict[str, list[str]] = {}
    for point in points:
        if point in done and point in known:
            batches.setdefault(known[point], []).append(point)
    fresh = [point for point in points if point not in done or point not in known]
    groups = (
        [point for point in fresh if point in done],
        [point for point in fresh if point not in done and point in trained],
        [point for point in fresh if point not in done and point not in trained],
    )
    for group in groups:
        for start in range(0, len(group), size):
            members = group[start : start + size]
            batches[_name(members)] = members
    return batches


def read_batches(record: Path) -> dict[str, list[str]]:
    """Return the batches that the run began with; points that left the experiment among them.

    Raises:
        InputError: the file is not what lorasweep writes.
    """
    return read_record(record, list)


def record_batches(batches: dict[str, list[str]], record: Path) -> None:
    """Write the batches down, for the jobs of this run and for the next run.

    Points that left the experiment stay in theirs on record: one that comes back is not evaluated anew for another.
    """
    known = read_batches(record)
    here = {point for members in batches.values() for point in members}
    kept = dict(batches)
    for name, members in known.items():
        if left := [point for point in members if point not in here]:
            kept[name] = [*kept.get(name, ()), *left]
    if kept != known:
        write_record(record, kept)


def _name(members: Sequence[str]) -> str:
    """The first point, how many more there are, and a digest of all."""
    digest = hashlib.sha256("\n".join(members).encode()).hexdigest()[:6]
    more = f"+{len(members) - 1}" if len(members) > 1 else ""
    return f"{members[0]}{more}-{digest}"
