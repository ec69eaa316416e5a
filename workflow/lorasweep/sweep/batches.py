"""Assign points to batches: one job evaluates a batch on one loaded base model (mode B2).

An evaluated point keeps its batch, so that Snakemake sees unchanged inputs and does not rerun it. All other points get
new batches, separate for trained and untrained points, so that no trained point waits for a training that keeps
failing.
"""

import hashlib
from collections.abc import Collection, Hashable, Iterable, Sequence
from pathlib import Path

from lorasweep.experiment.points import Point
from lorasweep.util.files import read_record, write_record


def group_alike(points: Iterable[Point]) -> list[list[str]]:
    """Return the names of points in groups that one job could evaluate: it has one specification of its evaluation.

    Points of another base model, that are asked otherwise or on other tasks are in other groups.
    """
    groups: dict[Hashable, list[str]] = {}
    for point in points:
        groups.setdefault((point.model, point.data.asked, point.base, point.tasks), []).append(point.name)
    return list(groups.values())


def assign_batches(
    points: Sequence[str], done: Collection[str], trained: Collection[str], size: int, record: Path
) -> dict[str, list[str]]:
    """Return batches of at most `size` points: names of points by the batch's name.

    `done` are the evaluated points, `trained` those that have an adapter; `record` is the experiment's `batches.json`,
    which need not exist yet.
    """
    previous = {point: batch for batch, members in read_batches(record).items() for point in members}
    batches: dict[str, list[str]] = {}
    for point in points:
        if point in done and point in previous:
            batches.setdefault(previous[point], []).append(point)
    fresh = [point for point in points if point not in done or point not in previous]
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
    """Return the recorded batches. They can include points that are no longer in the experiment.

    Raises:
        InputError: the file is not in lorasweep's format.
    """
    return read_record(record, list)


def record_batches(batches: dict[str, list[str]], record: Path) -> None:
    """Record the batches for the jobs of this run and for the next run.

    Points that were removed from the experiment stay on record, so that a point that is added back keeps its
    evaluation.
    """
    previous = read_batches(record)
    current = {point for members in batches.values() for point in members}
    merged = dict(batches)
    for name, members in previous.items():
        if removed := [point for point in members if point not in current]:
            merged[name] = [*merged.get(name, ()), *removed]
    if merged != previous:
        write_record(record, merged)


def _name(members: Sequence[str]) -> str:
    """Return a batch's name: its first point, the number of other points, and a digest of all."""
    digest = hashlib.sha256("\n".join(members).encode()).hexdigest()[:6]
    more = f"+{len(members) - 1}" if len(members) > 1 else ""
    return f"{members[0]}{more}-{digest}"
