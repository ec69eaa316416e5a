"""Read the scores of all samples from Inspect logs, with Inspect's own data frames. Requires Inspect and pandas."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

COLUMNS = ("point", "task", "sample", "epoch", "score", "value")

_KEY = ("id", "input", "target")
"""Columns that identify a sample. The id alone does not: a task that shuffles its data may reuse ids."""


def read_samples(logs: Iterable[Path]) -> pd.DataFrame:
    """Return the scores in Inspect logs at `<point>/eval/<task>.eval`.

    Columns: `point`, `task`, `sample` (a digest of id, input and target), `epoch`, `score`, `value`. A value is the
    number that Inspect's own metrics use: correct 1, partly correct 0.5, incorrect or no answer 0. A scorer with
    several values has one score per value, by its name.
    """
    from inspect_ai.analysis import SampleSummary, samples_df

    columns = [column for column in SampleSummary if column.name in (*_KEY, "epoch", "score_*")]
    rows = []
    for log in logs:
        for sample in samples_df(str(log), columns=columns, quiet=True).to_dict("records"):
            key = hashlib.sha256(json.dumps([str(sample[part]) for part in _KEY]).encode()).hexdigest()[:16]
            for score, value in _get_scores(sample):
                rows.append((log.parents[1].name, log.stem, key, sample["epoch"], score, value))
    # Sorted, since Inspect's order is that in which samples ended, which differs between runs.
    return pd.DataFrame(sorted(rows), columns=list(COLUMNS))


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
