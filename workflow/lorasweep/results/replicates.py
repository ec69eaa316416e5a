"""Aggregate points to settings: trainings that differ only in their seed are replicates of one setting.

A setting's metric has two sources of uncertainty: the samples of its evaluation and the seeds of its trainings. Its
interval covers both, and a difference is significant only if it holds over both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorasweep.results.inference import (
    Interval,
    Scores,
    get_difference_interval,
    get_p_value,
    get_unpaired_p_value,
)
from lorasweep.results.table import (
    PRUNED,
    SampleScores,
    adjust,
    describe_difference,
    describe_scores,
    find_base,
    is_metric,
    list_columns,
)

SETTING_TEXTS = {"setting": str, "trained_setting": str, "task": str, "points": str}
"""Columns of `replicates.csv` whose values are text, even if they look like numbers."""


@dataclass(frozen=True)
class Difference:
    """The difference of a metric between two settings."""

    value: float
    interval: Interval | None
    p_value: float | None
    """Of no difference; `None` if no test is possible."""
    pairs: int
    """Number of samples on which both have scores; 0 if they were compared by different samples."""
    shared: int
    """Number of samples that both have, if they are compared by different ones."""


def aggregate(table: pd.DataFrame, variables: Sequence[str], scores: SampleScores, confidence: float) -> pd.DataFrame:
    """Return one row per setting and task: means over seeds, with intervals and differences as in the table of points.

    Columns: `setting`, `trained_setting`, the variables except `seed`, `mode`, `task`, `seeds` (number of trainings),
    `points` (their names, joined by `;`), `lora_scale`, the metrics, and the columns `<metric>:<fact>`. Points whose
    trainings were stopped have rows of their own, with the column `pruned_after`.
    """
    metrics = [column for column in table.columns if is_metric(column)]
    kept = [key for key in variables if key != "seed"]
    rows = []
    stopped = [PRUNED] if PRUNED in table else []
    for (setting, task, *_), members in table.groupby(["setting", "task", *stopped], sort=False, dropna=False):
        first = members.iloc[0]
        row = {
            "setting": setting,
            "trained_setting": first["trained_setting"],
            **{key: first[key] for key in (*kept, *stopped)},
            "mode": first["mode"],
            "task": task,
            "seeds": max((int(members[metric].notna().sum()) for metric in metrics), default=0) or len(members),
            "points": ";".join(members["point"]),
            "lora_scale": first["lora_scale"],
        }
        for metric in metrics:
            if members[metric].notna().any():
                own, base = (collect_scores(each, metric, table, scores) for each in (row, get_base_row(row)))
                row |= {metric: own.mean} | describe_scores(metric, own, confidence)
                if (unscored := f"{metric}:unscored") in members and members[unscored].notna().any():
                    row[unscored] = int(members[unscored].sum())
                if base.seeds and row["mode"] != "base":
                    row |= describe_difference(metric, own, base, confidence)
        rows.append(row)
    for metric in metrics:
        for task in table["task"].dropna().unique():
            tested = [row for row in rows if f"{metric}:p" in row and row["task"] == task]
            adjust(tested, metric, [row["trained_setting"] for row in tested])
    frame = pd.DataFrame(rows).convert_dtypes()
    return frame[[*(column for column in frame.columns if "/" not in column), *list_columns(metrics, frame)]]


def count_modes_once(rows: pd.DataFrame, names: Sequence[str] = ("trained_setting",)) -> pd.DataFrame:
    """Return rows of `aggregate` with one of all modes that share `names`: that with the most seeds, or the first."""
    return rows.sort_values("seeds", ascending=False, kind="stable").drop_duplicates(list(names)).sort_index()


def get_base_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row, for `collect_scores`, of the base model of a row of `aggregate`."""
    return {"points": find_base(row), "mode": "base", "task": row["task"]}


def collect_scores(row: Mapping[str, Any], metric: str, table: pd.DataFrame, scores: SampleScores) -> Scores:
    """Return the scores of a metric of a row of `aggregate`; of no training, if no point has a value."""
    rows = table[(table["task"] == row["task"]) & table[metric].notna()]
    reported = dict(zip(rows["point"], rows[metric].astype(float), strict=True))
    points = [point for point in row["points"].split(";") if point in reported]
    return scores.collect(points, str(row["task"]), metric, reported, is_trained=row["mode"] != "base")


def compare_settings(
    first: Mapping[str, Any], second: Mapping[str, Any], metric: str, table: pd.DataFrame, scores: SampleScores
) -> float | None:
    """Return the p-value of no difference between two rows of `aggregate`; `None` if no test is possible."""
    return get_p_value(*(collect_scores(row, metric, table, scores) for row in (first, second)))


def measure_difference(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    metric: str,
    table: pd.DataFrame,
    scores: SampleScores,
    confidence: float,
) -> Difference:
    """Return the difference between two rows of `aggregate`, paired if both have scores of the same samples."""
    own, other = (collect_scores(row, metric, table, scores) for row in (first, second))
    is_paired = own.is_paired(other)
    p_value = get_p_value(own, other)
    return Difference(
        own.mean - other.mean,
        get_difference_interval(own, other, confidence),
        get_unpaired_p_value(own, other) if p_value is None else p_value,
        pairs=len(own.samples) if is_paired else 0,
        shared=0 if is_paired else len({*own.samples} & {*other.samples}),
    )
