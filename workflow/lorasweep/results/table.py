"""The table of results: one row per point and task, from the manifests and the samples' scores.

A metric has the column `<score>/<metric>`. Its statistics have columns `<score>/<metric>:<fact>`, see `FACTS`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorasweep.experiment.points import SEPARATOR, format_value, get_setting
from lorasweep.experiment.sections import BASE_KEY, MODE_KEY
from lorasweep.layout import BASELINE, MANIFEST
from lorasweep.results.inference import (
    Interval,
    adjust_p_values,
    get_mean_interval,
    get_paired_interval,
    get_paired_p_value,
    get_unpaired_interval,
)
from lorasweep.stages import GPU_RULES

if TYPE_CHECKING:
    from rich.console import Console

FACTS = (
    "low",
    "high",
    "interval",
    "delta",
    "delta_low",
    "delta_high",
    "delta_interval",
    "pairs",
    "p",
    "p_adjusted",
)
"""Suffixes of a metric's columns.

- `low`, `high`, `interval`: bounds of its confidence interval, and the interval's method
- `delta`, `delta_low`, `delta_high`, `delta_interval`: difference to the baseline, its bounds, and the method
- `pairs`: number of samples that point and baseline share; 0 if the interval is unpaired
- `p`, `p_adjusted`: p-value of no difference, and the same corrected for the number of points
"""

_PROOF = ("adapter_sha256", "base_model_fingerprint", "merged_weights_sha256", "probe_distance")
_TRAINING = (
    "final_train_loss",
    "final_validation_loss",
    "steps",
    "tokens",
    "batch_size_used",
    "data_sha256",
    "recipe_sha256",
)
_NO_MEANS = ("std", "var", "stderr", "min", "max")
"""Name endings of metrics that are not means of samples' scores, even if they happen to be equal to the mean."""


class SampleScores:
    """The scores of samples, averaged over epochs, by point, task and score.

    Args:
        samples: The table of `lorasweep.results.samples`; `None` for no scores.
    """

    def __init__(self, samples: pd.DataFrame | None) -> None:
        self._scores: dict[tuple[str, str, str], pd.Series[float]] = {}
        if samples is not None and len(samples):
            for (point, task, score), rows in samples.groupby(["point", "task", "score"]):
                self._scores[str(point), str(task), str(score)] = rows.groupby("sample")["value"].mean()

    def get(self, point: str, task: str, metric: str, reported: Any) -> "pd.Series[float] | None":
        """Return the score of each sample, if their mean is the reported metric; else `None`."""
        scores = self._scores.get((point, task, metric.rpartition("/")[0]))
        if (
            scores is None
            or metric.endswith(_NO_MEANS)
            or pd.isna(reported)
            or abs(scores.mean() - reported) > 1e-6 * max(1.0, abs(reported))
        ):
            return None
        return scores


def is_metric(column: str) -> bool:
    """Whether a column is a metric. Standard errors and columns `<metric>:<fact>` are not."""
    return "/" in column and not column.endswith("stderr") and column.rpartition(":")[2] not in FACTS


def describe_interval(metric: str, prefix: str, interval: Interval | None) -> dict[str, Any]:
    """Return the columns of an interval: of the metric, or with the prefix `delta_`, of its difference to the base."""
    return {
        f"{metric}:{prefix}low": interval and interval.low,
        f"{metric}:{prefix}high": interval and interval.high,
        f"{metric}:{prefix}interval": interval and interval.method,
    }


def make_table(
    results: Path,
    points: Sequence[str],
    variables: Sequence[str],
    scores: SampleScores,
    confidence: float,
) -> pd.DataFrame:
    """Return the rows of the given points; docs/results.md describes the columns.

    A point without scores of samples has no intervals and no paired comparisons.
    """
    rows = [row for point in points for row in _make_rows(results, point, variables)]
    for row in rows:
        for metric in filter(is_metric, list(row)):
            own = scores.get(row["point"], row["task"], metric, row[metric])
            interval = None if own is None else get_mean_interval(own.to_numpy(), confidence)
            row |= describe_interval(metric, "", interval)
    base = {row["task"]: row for row in rows if row["point"] == BASELINE}
    for row in rows:
        if row["task"] in base and row["mode"] != "base":
            for metric in filter(is_metric, list(row)):
                _compare(row, base[row["task"]], metric, scores, confidence)
    _adjust(rows)
    _name_settings(rows)
    _write_alike(rows, variables)
    # Keeps integers although the baseline's values are missing.
    table = pd.DataFrame(rows).convert_dtypes()
    metrics = sorted((column for column in table.columns if "/" in column), key=_order_metric)
    bases = [BASE_KEY] if any(BASE_KEY in row for row in rows) else []
    first = dict.fromkeys(
        ["point", "setting", *variables, *bases, "epoch", "seed", "mode", "task", "samples", *metrics]
    )
    table = table[[*first, *(column for column in table.columns if column not in first)]]
    # The baseline first, then by value; numbers are sorted as numbers, not as text.
    order = sorted(range(len(rows)), key=lambda i: _order(rows[i], variables))
    return table.iloc[order].drop(columns="_settings").reset_index(drop=True)


def show_table(table: pd.DataFrame, title: str, console: "Console") -> None:
    """Print the main columns: points, metrics with their intervals, and the size of each point's files."""
    from lorasweep.util.tables import FoldingTable

    metrics = [column for column in table.columns if is_metric(column)]
    facts = ["point", "mode", "task", "samples"]
    if table["task"].nunique() == 1:
        facts.remove("task")
        title = f"{title}: {table['task'].iloc[0]}"
    shown = FoldingTable([*facts, *metrics, "kept"], texts=["mode", "task"], title=title)
    for _, row in table.iterrows():
        cells = ["" if pd.isna(row[fact]) else format_value(row[fact], fact) for fact in facts]
        cells += [format_metric(row, metric) for metric in metrics]
        shown.add_row(*cells, f"{row['bytes'] / 1e6:,.1f} MB")
    console.print(shown)


def format_metric(row: "Mapping[str, Any] | pd.Series[Any]", metric: str) -> str:
    """Return a metric as text with its interval, or with its standard error if it has no interval."""
    value, low, high = (row.get(column) for column in (metric, f"{metric}:low", f"{metric}:high"))
    if value is None or pd.isna(value):
        return ""
    if low is not None and not pd.isna(low):
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    error = row.get(f"{metric.rpartition('/')[0]}/stderr")
    return f"{value:.3f}" + ("" if error is None or pd.isna(error) else f" ± {error:.3f}")


def format_gain(row: "Mapping[str, Any] | pd.Series[Any]", metric: str) -> str:
    """Return the difference to the base model as text with its interval; "" if there is none."""
    value, low, high = (row.get(f"{metric}:{fact}") for fact in ("delta", "delta_low", "delta_high"))
    if value is None or pd.isna(value):
        return ""
    return f"{value:+.3f}" + ("" if low is None or pd.isna(low) else f" [{low:+.3f}, {high:+.3f}]")


def _make_rows(results: Path, point: str, variables: Sequence[str]) -> list[dict[str, Any]]:
    manifest = json.loads((results / point / MANIFEST).read_text(encoding="utf-8"))
    evaluation, training = manifest["evaluation"], manifest["training"]
    settings = manifest["settings"] | {MODE_KEY: manifest["mode"]}
    seconds = manifest["seconds"]
    without_seed = {key: value for key, value in settings.items() if key != "seed"}
    shared = {
        "point": point,
        "_settings": json.dumps(without_seed, sort_keys=True),
        **{key: _plain(get_setting(settings, key)) for key in variables},
        **({BASE_KEY: settings[BASE_KEY]} if BASE_KEY in settings else {}),
        "epoch": training.get("epochs"),
        "seed": settings.get("seed"),
        "mode": settings[MODE_KEY],
    }
    proof = {key: (evaluation.get("proof") or {}).get(key) for key in _PROOF}
    gpus = {stage: evaluation.get("gpus", 1) for stage in GPU_RULES} | {"train": settings.get("gpus", 1)}
    on_gpu = sum((value or 0) * gpus.get(stage, 1) for stage, value in seconds.items() if stage in GPU_RULES)
    facts = {
        **{key: training.get(key) for key in _TRAINING},
        **proof,
        "adapter_sha256": manifest["adapter_sha256"],
        "merged_weights_sha256": manifest.get("merged_weights_sha256"),
        "evaluation_sha256": evaluation.get("evaluation_sha256"),
        **{f"{stage}_seconds": value for stage, value in seconds.items()},
        "gpu_hours": on_gpu / 3600 if manifest["device"] == "cuda" else 0.0,
        "bytes": manifest["bytes"],
        "git_revision": manifest["git_revision"],
        "versions": _join_versions(manifest),
        "adapter": str(results / point / "adapter") if manifest["adapter_sha256"] else None,
        "recipe": str(results / point / "recipe.yaml") if "recipe_sha256" in training else None,
    }
    scored = evaluation.get("tasks") or {None: {"scores": {}, "samples": None}}
    return [
        {
            **shared,
            "task": task,
            "samples": result["samples"],
            **result["scores"],
            **facts,
            "log": str(results / point / "eval" / f"{task}.eval") if task else None,
        }
        for task, result in scored.items()
    ]


def _compare(
    row: dict[str, Any], base: Mapping[str, Any], metric: str, scores: SampleScores, confidence: float
) -> None:
    """Add the difference of a metric to the baseline's, by pairs of samples if both were scored on the same ones."""
    if row[metric] is None or base.get(metric) is None:
        return
    own, other = (scores.get(r["point"], r["task"], metric, r[metric]) for r in (row, base))
    row[f"{metric}:delta"] = row[metric] - base[metric]
    both = [] if own is None or other is None else sorted(own.index.intersection(other.index))
    if own is not None and other is not None and len(both) == len(own) == len(other):
        row[f"{metric}:pairs"] = len(both)
        paired = own[both].to_numpy(), other[both].to_numpy()
        interval = get_paired_interval(*paired, confidence)
        row[f"{metric}:p"] = get_paired_p_value(*paired)
    else:
        row[f"{metric}:pairs"] = 0
        interval = get_unpaired_interval(row[metric], _read(row, metric), base[metric], _read(base, metric))
    row |= describe_interval(metric, "delta_", interval)


def _read(row: Mapping[str, Any], metric: str) -> Interval | None:
    low = row.get(f"{metric}:low")
    return None if low is None else Interval(low, row[f"{metric}:high"], row[f"{metric}:interval"])


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Add p-values that are corrected for the number of points compared with the baseline on a task."""
    families: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for row in rows:
        for column in row:
            if column.endswith(":p"):
                families.setdefault((row["task"], column), []).append(row)
    for (_, column), members in families.items():
        for row, adjusted in zip(members, adjust_p_values([row[column] for row in members]), strict=True):
            row[f"{column}_adjusted"] = adjusted


def _name_settings(rows: Sequence[dict[str, Any]]) -> None:
    """Add `setting`: the common name of points that differ only in their seed."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(row["_settings"], []).append(row["point"])
    names: dict[str, str] = {}
    taken = {row["point"] for row in rows}
    for settings, points in groups.items():
        name = points[0]
        if len(set(points)) > 1:
            name = SEPARATOR.join(part for part in name.split(SEPARATOR) if not part.startswith("seed=")) or "any seed"
        names[settings] = points[0] if name in taken - set(points) else name
        taken.add(names[settings])
    for row in rows:
        row["setting"] = names[row["_settings"]]


def _write_alike(rows: Sequence[dict[str, Any]], variables: Sequence[str]) -> None:
    """Write the values of a variable that has both words and numbers, such as `lora_alpha`, as text: files need it."""
    for key in variables:
        kinds = {isinstance(row[key], str) for row in rows if row[key] is not None}
        for row in rows if len(kinds) > 1 else ():
            row[key] = None if row[key] is None else format_value(row[key], key)


def _join_versions(manifest: Mapping[str, Any]) -> str:
    made_with = {**manifest["training"].get("versions", {}), **manifest["evaluation"].get("versions", {})}
    return " ".join(f"{package}={version}" for package, version in sorted(made_with.items()))


def _plain(value: Any) -> Any:
    return format_value(value) if isinstance(value, list | dict) else value


def _order_metric(column: str) -> tuple[str, int]:
    """Order the columns of metrics by name, each followed by its facts in their own order: `low` before `high`."""
    metric, _, fact = column.rpartition(":")
    return (metric, 1 + FACTS.index(fact)) if fact in FACTS else (column, 0)


def _order(row: Mapping[str, Any], variables: Sequence[str]) -> tuple[Any, ...]:
    def rank(value: Any) -> tuple[int, float, str]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not pd.isna(value)
        return (0, float(value), "") if is_number else (1, 0.0, str(value))

    return (row["mode"] != "base", *(rank(row[key]) for key in variables), str(row["point"]), str(row["task"]))
