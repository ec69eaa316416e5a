"""Aggregate points to settings: trainings that differ only in their seed are replicates of one setting.

A setting's metric has two sources of uncertainty: the samples of its evaluation and the seeds of its trainings. Its
interval is the wider of the two, and a difference is significant only if both tests agree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lorasweep.layout import BASELINE
from lorasweep.results.inference import (
    Interval,
    adjust_p_values,
    get_baseline_p_value,
    get_mean_interval,
    get_paired_interval,
    get_paired_p_value,
    get_replicates_interval,
    get_replicates_p_value,
    get_unpaired_interval,
    get_unpaired_p_value,
    widen,
)
from lorasweep.results.table import SampleScores, describe_interval, is_metric


def aggregate(table: pd.DataFrame, variables: Sequence[str], scores: SampleScores, confidence: float) -> pd.DataFrame:
    """Return one row per setting and task: means over seeds, with intervals and differences as in the table of points.

    Columns: `setting`, the variables except `seed`, `mode`, `task`, `seeds` (number of trainings), `points` (their
    names, joined by `;`), the metrics, and the columns `<metric>:<fact>`.
    """
    metrics = [column for column in table.columns if is_metric(column)]
    kept = [key for key in variables if key != "seed"]
    rows = []
    for (setting, task), members in table.groupby(["setting", "task"], sort=False, dropna=False):
        first = members.iloc[0]
        row = {
            "setting": setting,
            **{key: first[key] for key in kept},
            "mode": first["mode"],
            "task": task,
            "seeds": max(int(members[metric].notna().sum()) for metric in metrics) if metrics else len(members),
            "points": ";".join(members["point"]),
        }
        base = table[(table["point"] == BASELINE) & (table["task"] == task)]
        for metric in metrics:
            row |= _aggregate_metric(members, base, task, metric, scores, confidence)
        rows.append(row)
    for metric in metrics:
        for task in table["task"].dropna().unique():
            tested = [row for row in rows if row.get(f"{metric}:p") is not None and row["task"] == task]
            for row, adjusted in zip(tested, adjust_p_values([r[f"{metric}:p"] for r in tested]), strict=True):
                row[f"{metric}:p_adjusted"] = adjusted
    return pd.DataFrame(rows).convert_dtypes()


def compare_settings(
    first: Mapping[str, Any], second: Mapping[str, Any], metric: str, table: pd.DataFrame, scores: SampleScores
) -> float | None:
    """Return the p-value of no difference between two rows of `aggregate`; `None` if no test is possible.

    It is the larger of two p-values (Berger 1982, Technometrics 24:295): by samples, if both rows have scores of the
    same samples, and by seeds, if both have several.
    """
    own, other = (_average(row, metric, table, scores) for row in (first, second))
    p_values = [get_replicates_p_value(*(_get_means(row, metric, table) for row in (first, second)))]
    if own is not None and other is not None and own.index.equals(other.index):
        p_values.append(get_paired_p_value(own.to_numpy(), other.to_numpy()))
    return max((p_value for p_value in p_values if p_value is not None), default=None)


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


def measure_difference(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    metric: str,
    table: pd.DataFrame,
    scores: SampleScores,
    confidence: float,
) -> Difference:
    """Return the difference between two rows of `aggregate`, paired if both have scores of the same samples.

    As for a setting, the interval is the wider of those over samples and over seeds, and the larger p-value counts.
    """
    own, other = (_average(row, metric, table, scores) for row in (first, second))
    each = [_get_means(row, metric, table) for row in (first, second)]
    value = float(first[metric] - second[metric])
    p_values = [get_replicates_p_value(*each)]
    intervals = [get_replicates_interval(means, confidence) for means in each]
    over_seeds = get_unpaired_interval(first[metric], intervals[0], second[metric], intervals[1])
    over_samples, pairs, shared = None, 0, 0
    if own is not None and other is not None:
        both = own.to_numpy(), other.to_numpy()
        if own.index.equals(other.index):
            pairs = len(own)
            over_samples = get_paired_interval(*both, confidence)
            p_values.append(get_paired_p_value(*both))
        else:
            shared = len(own.index.intersection(other.index))
            of_each = [get_mean_interval(values, confidence) for values in both]
            over_samples = get_unpaired_interval(first[metric], of_each[0], second[metric], of_each[1])
            p_values.append(get_unpaired_p_value(*both))
    p_value = max((p for p in p_values if p is not None), default=None)
    return Difference(value, widen(over_samples, over_seeds), p_value, pairs, shared)


def _aggregate_metric(
    members: pd.DataFrame, base: pd.DataFrame, task: Any, metric: str, scores: SampleScores, confidence: float
) -> dict[str, Any]:
    means = members[metric].dropna().astype(float).to_numpy()
    if not len(means):
        return {}
    mean = float(means.mean())
    averaged = _average({"points": ";".join(members["point"]), "task": task}, metric, members, scores)
    by_samples = None if averaged is None else get_mean_interval(averaged.to_numpy(), confidence)
    by_both = widen(by_samples, get_replicates_interval(means, confidence))
    columns = {metric: mean} | describe_interval(metric, "", by_both)
    if base.empty or pd.isna(base.iloc[0][metric]) or members.iloc[0]["mode"] == "base":
        return columns
    start = float(base.iloc[0][metric])
    other = scores.get(BASELINE, str(task), metric, start)
    columns[f"{metric}:delta"] = mean - start
    p_values = [get_baseline_p_value(means, start)]
    over_seeds = get_replicates_interval(means - start, confidence)
    if averaged is not None and other is not None and averaged.index.equals(other.index):
        over_samples = get_paired_interval(averaged.to_numpy(), other.to_numpy(), confidence)
        p_values.append(get_paired_p_value(averaged.to_numpy(), other.to_numpy()))
        columns[f"{metric}:pairs"] = len(other)
    else:
        own = None if other is None else get_mean_interval(other.to_numpy(), confidence)
        over_samples = get_unpaired_interval(mean, by_samples, start, own)
        columns[f"{metric}:pairs"] = 0
    columns[f"{metric}:p"] = max((p for p in p_values if p is not None), default=None)
    return columns | describe_interval(metric, "delta_", widen(over_samples, over_seeds))


def _get_means(row: Mapping[str, Any], metric: str, table: pd.DataFrame) -> Any:
    members = table[table["point"].isin(row["points"].split(";")) & (table["task"] == row["task"])]
    return members[metric].dropna().astype(float).to_numpy()


def _average(
    row: Mapping[str, Any], metric: str, table: pd.DataFrame, scores: SampleScores
) -> "pd.Series[float] | None":
    """Return each sample's mean score over a setting's trainings; `None` if their samples differ."""
    points = row["points"].split(";")
    members = table[table["point"].isin(points) & (table["task"] == row["task"])]
    reported = dict(zip(members["point"], members[metric], strict=True))
    each = [scores.get(point, str(row["task"]), metric, reported.get(point)) for point in points]
    available = [series for series in each if series is not None]
    if len(available) < len(points) or any(not series.index.equals(available[0].index) for series in available):
        return None
    return pd.concat(available, axis=1).mean(axis=1)
