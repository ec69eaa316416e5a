"""The scores of every sample of every log, as Inspect's own data frames give them. Needs Inspect, and pandas."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

COLUMNS = ("point", "task", "sample", "epoch", "score", "value")

_KEY = ("id", "input", "target")
"""What makes two samples the same: a task that shuffles its data may give one id to several."""


def read_samples(logs: Iterable[Path]) -> pd.DataFrame:
    """Return the scores in Inspect logs that lie at `<point>/eval/<task>.eval`.

    Columns: `point`, `task`, `sample` (alike for the same id, input and target), `epoch`, `score`, `value`. A value is
    a number as Inspect's own metrics take it: right 1, partly right 0.5, wrong or no answer 0. A scorer that gives
    several values has as many scores, by their names.
    """
    from inspect_ai.analysis import SampleSummary, samples_df

    columns = [column for column in SampleSummary if column.name in (*_KEY, "epoch", "score_*")]
    rows = []
    for log in logs:
        for sample in samples_df(str(log), columns=columns, quiet=True).to_dict("records"):
            key = hashlib.sha256(json.dumps([str(sample[part]) for part in _KEY]).encode()).hexdigest()[:16]
            for score, value in _get_scores(sample):
                rows.append((log.parents[1].name, log.stem, key, sample["epoch"], score, value))
    # Inspect has them in the order in which they ended, which no two runs have in common.
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
