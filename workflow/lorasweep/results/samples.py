"""Read the scores of all samples from Inspect logs, with Inspect's own data frames. Requires Inspect and pandas."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lorasweep.util.errors import InputError, nearest

COLUMNS = ("point", "task", "sample", "epoch", "score", "value")

_KEY = ("id", "input", "target")
"""Columns that identify a sample. The id alone does not: a task that shuffles its data may reuse ids."""


def read_samples(logs: Iterable[Path], cluster: str | None = None) -> pd.DataFrame:
    """Return the scores in Inspect logs at `<point>/eval/<task>.eval`.

    Columns: `point`, `task`, `sample` (a digest of id, input and target), `epoch`, `score`, `value`. A value is the
    number that Inspect's own metrics use: correct 1, partly correct 0.5, incorrect or no answer 0. A scorer with
    several values has one score per value, by its name. `cluster` is a key of the samples' metadata: a digest of its
    value is in the column `cluster`, for tasks whose samples have the key.

    Raises:
        InputError: no task has samples with the key, or only some samples of a task have it.
    """
    from inspect_ai.analysis import SampleColumn, SampleSummary, samples_df

    columns = [column for column in SampleSummary if column.name in (*_KEY, "epoch", "score_*")]
    if cluster:
        # Summaries cut long values off.
        columns.append(SampleColumn("metadata_*", path="metadata", full=True))
    rows: list[tuple[Any, ...]] = []
    found: dict[str, set[bool]] = {}
    keys: set[str] = set()
    for log in logs:
        for sample in samples_df(str(log), columns=columns, quiet=True).to_dict("records"):
            key = _digest([str(sample[part]) for part in _KEY])
            group: tuple[str | None, ...] = ()
            if cluster:
                metadata = _get_metadata(sample)
                keys |= metadata.keys()
                found.setdefault(log.stem, set()).add(cluster in metadata)
                group = (_digest(str(metadata[cluster])) if cluster in metadata else None,)
            for score, value in _get_scores(sample):
                rows.append((log.parents[1].name, log.stem, key, sample["epoch"], score, value, *group))
    if cluster and found:
        _check_clusters(cluster, found, keys)
    # Sorted, since Inspect's order is that in which samples ended, which differs between runs.
    rows.sort(key=lambda row: row[:6])
    return pd.DataFrame(rows, columns=[*COLUMNS, *(["cluster"] if cluster else [])])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _get_metadata(sample: dict[str, Any]) -> dict[str, Any]:
    named = {column.removeprefix("metadata_"): value for column, value in sample.items() if column[:9] == "metadata_"}
    return {key: value for key, value in named.items() if not pd.isna(value)}


def _check_clusters(cluster: str, found: Mapping[str, Collection[bool]], keys: Collection[str]) -> None:
    """Check that all samples of a task have the key or none, and those of some task do."""
    if all(True not in has for has in found.values()):
        problem = f"report.cluster: no sample has the key {cluster!r} in its metadata{nearest(cluster, keys)}"
        raise InputError(problem, ", ".join(sorted(keys)) or "null, as no sample has metadata")
    for task, has in found.items():
        if len(has) > 1:
            raise InputError(
                f"report.cluster: only some samples of the task '{task}' have the key {cluster!r} in their metadata",
                "a key that all samples of a task have",
            )


def _get_scores(sample: dict[str, Any]) -> Iterator[tuple[str, float]]:
    from inspect_ai.scorer import value_to_float

    for column, value in sample.items():
        if not column.startswith("score_") or value is None or value != value:
            continue
        score = column.removeprefix("score_")
        values = json.loads(value) if isinstance(value, str) and value.startswith("{") else {score: value}
        for name, part in values.items():
            if part is not None and part == part:
                yield name, float(value_to_float()(part))
