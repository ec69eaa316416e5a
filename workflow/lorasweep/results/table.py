"""The table of results: one row per point and task, from the manifests and the samples' scores.

A metric has the column `<score>/<metric>`. Its statistics have columns `<score>/<metric>:<fact>`, see `FACTS`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from lorasweep.experiment.points import SEPARATOR, format_value, get_setting
from lorasweep.experiment.sections import BASE_KEY, MODE_KEY, MODEL_KEY, Controls
from lorasweep.layout import MANIFEST, get_baseline_name, is_base
from lorasweep.results.inference import (
    Interval,
    Scores,
    adjust_p_values,
    get_difference_interval,
    get_mean_interval,
    get_p_value,
    get_standard_error,
)
from lorasweep.stages import GPU_RULES
from lorasweep.util.files import find_record
from lorasweep.util.formats import format_bytes, format_score
from lorasweep.util.usage import summarise

if TYPE_CHECKING:
    from rich.console import Console

FACTS = (
    "stderr",
    "low",
    "high",
    "interval",
    "unscored",
    "delta",
    "delta_low",
    "delta_high",
    "delta_interval",
    "pairs",
    "p",
    "p_adjusted",
)
"""Suffixes of a metric's columns.

- `stderr`: standard error of the mean
- `low`, `high`, `interval`: bounds of its confidence interval, and the interval's method
- `unscored`: number of answers that have no score, which the metric leaves out
- `delta`, `delta_low`, `delta_high`, `delta_interval`: difference to the point's base model, its bounds, and the method
- `pairs`: number of samples that point and baseline share; 0 if the interval is unpaired
- `p`, `p_adjusted`: p-value of no difference, and the same corrected for the number of adapters
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


CONFIDENCE = "confidence"
"""Attribute of the table of points: the level of its intervals."""

PRUNED = "pruned_after"
"""Column of tables with points whose trainings were stopped (`prune`): the epoch after which each was."""


def leave_out_pruned(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of points or settings whose trainings were not stopped."""
    return rows[rows[PRUNED].isna()] if PRUNED in rows else rows


class SampleScores:
    """The scores of samples, averaged over epochs, by point, task and score.

    Args:
        samples: The table of `lorasweep.results.samples`; `None` for no scores.
    """

    def __init__(self, samples: pd.DataFrame | None) -> None:
        self._scores: dict[tuple[str, str, str], pd.Series[float]] = {}
        self._counts: dict[tuple[str, str, str], int] = {}
        self._are_shares: dict[tuple[str, str], bool] = {}
        self._clusters: dict[str, dict[str, Any]] = {}
        if samples is None or not len(samples):
            return
        for (point, task, score), rows in samples.groupby(["point", "task", "score"]):
            self._scores[str(point), str(task), str(score)] = rows.groupby("sample")["value"].mean()
            self._counts[str(point), str(task), str(score)] = len(rows)
        for (task, score), rows in samples.groupby(["task", "score"]):
            self._are_shares[str(task), str(score)] = bool(rows["value"].between(0, 1).all())
        if "cluster" in samples:
            for task, rows in samples.dropna(subset="cluster").groupby("task"):
                self._clusters[str(task)] = dict(zip(rows["sample"], rows["cluster"], strict=True))

    def has_clusters(self, task: str) -> bool:
        """Whether the samples of a task are in clusters."""
        return task in self._clusters

    def count_unscored(self, row: Mapping[str, Any], metric: str) -> int:
        """Return how many of the answers of a row's point have no score of a metric's scorer; 0 if none has one."""
        score = re.sub(r"\[[^]]*\]$", "", metric.rpartition("/")[0])  # without the reducer
        answers = int(row["samples"])
        return max(0, answers - self._counts.get((row["point"], row["task"], score), answers))

    def collect(
        self, points: Sequence[str], task: str, metric: str, reported: Mapping[str, Any], is_trained: bool = True
    ) -> Scores:
        """Return the scores of points that are replicates: of the samples that all of them have, if their means are the
        reported values; else, the reported values alone.

        `reported` has the metric of every point of the task.
        """
        score = metric.rpartition("/")[0]
        each = [self._find(point, task, metric, reported[point]) for point in points]
        found = [series for series in each if series is not None]
        if found and len(found) == len(each) and all(series.index.equals(found[0].index) for series in found):
            samples = tuple(found[0].index)
            clusters = self._clusters.get(task)
            if clusters and not clusters.keys() >= {*samples}:
                clusters = None  # of two experiments, one has no clusters
            return Scores(
                np.array([series.to_numpy() for series in found]),
                samples,
                np.array([clusters[sample] for sample in samples]) if clusters else None,
                self._are_shares[task, score],
                is_trained,
            )
        is_share = 0 <= min(reported.values(), default=0) <= max(reported.values(), default=0) <= 1
        means = np.array([float(reported[point]) for point in points])
        return Scores(means[:, None], is_share=is_share, is_trained=is_trained)

    def _find(self, point: str, task: str, metric: str, reported: Any) -> "pd.Series[float] | None":
        """Return the score of each sample, if their mean is the reported metric; else `None`."""
        scores = self._scores.get((point, task, metric.rpartition("/")[0]))
        is_mean = scores is not None and abs(scores.mean() - reported) <= 1e-6 * max(1.0, abs(reported))
        return scores if is_mean and not metric.endswith(_NO_MEANS) else None


def is_metric(column: str) -> bool:
    """Whether a column is a metric. Standard errors and columns `<metric>:<fact>` are not."""
    return "/" in column and not column.endswith("stderr") and not _is_fact(column)


def describe_interval(metric: str, prefix: str, interval: Interval | None) -> dict[str, Any]:
    """Return the columns of an interval: of the metric, or with the prefix `delta_`, of its difference to the base."""
    return {
        f"{metric}:{prefix}low": interval and interval.low,
        f"{metric}:{prefix}high": interval and interval.high,
        f"{metric}:{prefix}interval": interval and interval.method,
    }


def describe_scores(metric: str, scores: Scores, confidence: float) -> dict[str, Any]:
    """Return the columns of a metric that say how certain it is."""
    interval = get_mean_interval(scores, confidence)
    error = None if interval is None else get_standard_error(scores)
    return {f"{metric}:stderr": error} | describe_interval(metric, "", interval)


def describe_difference(metric: str, scores: Scores, base: Scores, confidence: float) -> dict[str, Any]:
    """Return the columns of a metric's difference to the baseline."""
    p_value = get_p_value(scores, base)
    return {
        f"{metric}:delta": scores.mean - base.mean,
        f"{metric}:pairs": len(scores.samples) if scores.is_paired(base) else 0,
        **({} if p_value is None else {f"{metric}:p": p_value}),
        **describe_interval(metric, "delta_", get_difference_interval(scores, base, confidence)),
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
    _name_settings(rows)
    reported: dict[tuple[Any, str], dict[str, Any]] = {}
    for row in rows:
        for metric in filter(is_metric, row):
            if row[metric] is not None:
                reported.setdefault((row["task"], metric), {})[row["point"]] = row[metric]
    for (task, metric), values in reported.items():
        bases = {
            name: scores.collect([name], task, metric, values, is_trained=False) for name in filter(is_base, values)
        }
        for row in rows:
            if row["task"] != task or row.get(metric) is None:
                continue
            own = scores.collect([row["point"]], task, metric, values)
            row |= describe_scores(metric, own, confidence)
            if unscored := scores.count_unscored(row, metric):
                row[f"{metric}:unscored"] = unscored
            if row["mode"] != "base" and (base := bases.get(find_base(row))):
                row |= describe_difference(metric, own, base, confidence)
        compared = [row for row in rows if row["task"] == task and f"{metric}:p" in row]
        adjust(compared, metric, [(row["trained_setting"], row["seed"]) for row in compared])
    _write_alike(rows, variables)
    # Keeps integers although the baseline's values are missing.
    table = pd.DataFrame(rows).convert_dtypes()
    order = order_metrics([column for column in row if "/" in column and not _is_fact(column)] for row in rows)
    metrics = list_columns(order, table)
    precisions = [BASE_KEY] if any(BASE_KEY in row for row in rows) else []
    names = ["point", "setting", "trained_setting"]
    epochs = ["epoch", *([PRUNED] if PRUNED in table else [])]
    first = dict.fromkeys([*names, *variables, *precisions, *epochs, "seed", "mode", "task", "samples", *metrics])
    table = table[[*first, *(column for column in table.columns if column not in first)]]
    # The baseline first, then by value; numbers are sorted as numbers, not as text.
    places = sorted(range(len(rows)), key=lambda i: _order(rows[i], variables))
    table = table.iloc[places].drop(columns=["_settings", "_trained"]).reset_index(drop=True)
    table.attrs[CONFIDENCE] = confidence
    return table


def find_base(row: "Mapping[str, Any] | pd.Series[Any]") -> str:
    """Return the name of the base model of a point or of a setting, to which its gain is the difference."""
    model = row.get(MODEL_KEY)
    return get_baseline_name(model if isinstance(model, str) else None)


def order_metrics(rows: Iterable[Sequence[str]]) -> list[str]:
    """Merge the metrics of rows, each in the order in which Inspect lists them, so that each first one stays first."""
    order: list[str] = []
    for metrics in rows:
        place = len(order)
        for metric in reversed(metrics):
            if metric in order:
                place = order.index(metric)
            else:
                order.insert(place, metric)
    return order


def list_metrics(results: Path, table: pd.DataFrame, task: str) -> list[str]:
    """Return the metrics that have a value on a task, in the order in which Inspect lists them for its first point.

    The columns of the table have one order for all tasks, which is not each one's own.
    """
    rows = table[table["task"] == task]
    names = [column for column in table.columns if is_metric(column) and rows[column].notna().any()]
    evaluation = find_record(results / str(rows["point"].iloc[0]) / MANIFEST).get("evaluation", {}) if names else {}
    listed = list(evaluation.get("tasks", {}).get(task, {}).get("scores", ()))
    return sorted(names, key=lambda name: listed.index(name) if name in listed else len(listed))


def list_columns(metrics: Sequence[str], table: pd.DataFrame) -> list[str]:
    """Return the columns of metrics that a table has, each followed by its facts in their order."""
    columns = (column for name in metrics for column in (name, *(f"{name}:{fact}" for fact in FACTS)))
    return [column for column in columns if column in table]


def adjust(rows: Sequence[dict[str, Any]], metric: str, compared: Sequence[Any]) -> None:
    """Add p-values that are corrected for the number of comparisons with the baseline; the same `compared` are one."""
    for row, adjusted in zip(rows, adjust_p_values([row[f"{metric}:p"] for row in rows], compared), strict=True):
        row[f"{metric}:p_adjusted"] = adjusted


def show_table(table: pd.DataFrame, title: str, console: "Console") -> None:
    """Print a table for each task: points, metrics with their intervals, and the size of each point's files."""
    from lorasweep.util.tables import FoldingTable

    for task, rows in table.groupby("task", sort=False, dropna=False):
        metrics = [column for column in table.columns if is_metric(column) and rows[column].notna().any()]
        heading = title if pd.isna(task) else f"{title}: {task!s}"
        stopped = PRUNED in rows and rows[PRUNED].notna().any()
        columns = ["point", *metrics, "samples", "mode", "kept", *(["stopped after"] if stopped else [])]
        shown = FoldingTable(columns, texts=["mode"], title=heading)
        for _, row in rows.iterrows():
            samples = format_samples(row, metrics)
            scores = [format_metric(row, metric) for metric in metrics]
            after = ["" if pd.isna(row[PRUNED]) else f"epoch {row[PRUNED]:.0f}"] if stopped else []
            shown.add_row(row["point"], *scores, samples, row["mode"], format_bytes(row["bytes"]), *after)
        console.print(shown)


def format_metric(row: "Mapping[str, Any] | pd.Series[Any]", metric: str) -> str:
    """Return a metric as text with its interval, or with its standard error if it has no interval."""
    value, low, high = [cast("Any", row.get(column)) for column in (metric, f"{metric}:low", f"{metric}:high")]
    if value is None or pd.isna(value):
        return ""
    if low is not None and high is not None and not pd.isna(low):
        return f"{format_score(value)} [{format_score(low)}, {format_score(high)}]"
    error = row.get(f"{metric.rpartition('/')[0]}/stderr")
    return format_score(value) + ("" if error is None or pd.isna(error) else f" ± {format_score(error)}")


def format_samples(row: "Mapping[str, Any] | pd.Series[Any]", metrics: Iterable[str]) -> str:
    """Return the number of samples as text; if some have no score of one of the metrics, as `1 of 4`."""
    samples: Any = row["samples"]
    if pd.isna(samples):
        return ""
    unscored = [cast("Any", row.get(f"{metric}:unscored")) for metric in metrics]
    most = max((int(count) for count in unscored if count is not None and pd.notna(count)), default=0)
    return f"{samples - most:.0f} of {samples:.0f}" if most else f"{samples:.0f}"


def format_gain(row: "Mapping[str, Any] | pd.Series[Any]", metric: str) -> str:
    """Return the difference to the base model as text with its interval; "" if there is none."""
    value, low, high = (row.get(f"{metric}:{fact}") for fact in ("delta", "delta_low", "delta_high"))
    if value is None or pd.isna(value):
        return ""
    gain = format_score(value, "+")
    if low is None or high is None or pd.isna(low):
        return gain
    return f"{gain} [{format_score(low, '+')}, {format_score(high, '+')}]"


def _describe_best_epoch(best: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a training whose best epoch was kept: by its loss, or by its score on a task."""
    scored = {"validation_score": "score", "validation_stderr": "standard_error"} if "task" in best else {}
    columns = {"epochs_trained": "epochs_trained", **scored} if best else {}
    return {column: best[key] for column, key in columns.items()}


def _make_rows(results: Path, point: str, variables: Sequence[str]) -> list[dict[str, Any]]:
    manifest = json.loads((results / point / MANIFEST).read_text(encoding="utf-8"))
    evaluation, training = manifest["evaluation"], manifest["training"]
    # The record of an adopted adapter repeats what its source's said of its training elsewhere.
    is_trained = "recipe_sha256" in training and "adopted_from" not in training
    settings = manifest["settings"] | {MODE_KEY: manifest["mode"]}
    seconds = manifest["seconds"]
    without_seed = {key: value for key, value in settings.items() if key != "seed"}
    trained = {key: value for key, value in without_seed.items() if key != MODE_KEY}
    shared = {
        "point": point,
        "_settings": json.dumps(without_seed, sort_keys=True),
        "_trained": json.dumps(trained, sort_keys=True),
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
        **_describe_best_epoch(training.get("best_epoch", {})),
        **({PRUNED: training["pruned"]["after"]} if is_trained and "pruned" in training else {}),
        "lora_scale": _get_scale(settings) if "lora_rank" in settings else None,
        **proof,
        "adapter_sha256": manifest["adapter_sha256"],
        "merged_weights_sha256": manifest.get("merged_weights_sha256"),
        "evaluation_sha256": evaluation.get("evaluation_sha256"),
        **{f"{stage}_seconds": value for stage, value in seconds.items()},
        **summarise(manifest.get("usage", {}).values()),
        "gpu_hours": on_gpu / 3600 if manifest["device"] == "cuda" else 0.0,
        "bytes": manifest["bytes"],
        "git_revision": _join_revisions(manifest),
        "versions": _join_versions(manifest),
        "adapter": str(results / point / "adapter") if manifest["adapter_sha256"] else None,
        "recipe": str(results / point / "recipe.yaml") if is_trained else None,
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


def _get_scale(settings: Mapping[str, Any]) -> float:
    """Return what a point's update B·A is multiplied by: alpha / r, or alpha / √r with rsLoRA."""
    # The values were checked before they were recorded.
    controls = Controls.model_construct(**settings)
    return controls.alpha / (sqrt(controls.lora_rank) if controls.use_rslora else controls.lora_rank)


def _name_settings(rows: Sequence[dict[str, Any]]) -> None:
    """Add the common names of points: `setting`, where only the seed differs, and `trained_setting`, where the mode
    differs too but the adapters do not."""
    _name_groups(rows, "setting", lambda row: row["_settings"], lambda row: row["point"], ["seed"])
    joined = _join_modes(rows)
    differing = [MODE_KEY, "seed"]
    _name_groups(rows, "trained_setting", lambda row: joined[row["setting"]], lambda row: row["setting"], differing)


def _join_modes(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a key for each setting, which settings share that differ only in their mode, and have the same adapters.

    A mode may lack a seed: the adapters must be the same of all seeds that both have, and these must be one or more.
    """
    adapters: dict[str, dict[Any, set[str]]] = {}
    for row in rows:
        adapters.setdefault(row["setting"], {}).setdefault(row["seed"], set()).add(row["adapter_sha256"])
    trained = {row["setting"]: row["setting"] if row["mode"] == "base" else row["_trained"] for row in rows}
    groups: dict[str, dict[str, dict[Any, set[str]]]] = {}
    keys = {}
    for setting in sorted(adapters, key=lambda setting: -len(adapters[setting])):
        own, alike = adapters[setting], groups.setdefault(trained[setting], {})
        keys[setting] = next((name for name, group in alike.items() if _agree(own, group)), setting)
        alike[keys[setting]] = own | alike.get(keys[setting], {})
    return keys


def _agree(adapters: Mapping[Any, set[str]], others: Mapping[Any, set[str]]) -> bool:
    shared = adapters.keys() & others.keys()
    return bool(shared) and all(adapters[seed] == others[seed] for seed in shared)


def _name_groups(
    rows: Sequence[dict[str, Any]],
    column: str,
    get_key: Callable[[Mapping[str, Any]], Any],
    get_name: Callable[[Mapping[str, Any]], str],
    differing: Sequence[str],
) -> None:
    """Add a column: the name of each row, or of rows of one key, their name without as many of the variables as it
    takes for them to have the same."""
    groups: dict[Any, list[str]] = {}
    for row in rows:
        groups.setdefault(get_key(row), []).append(get_name(row))
    taken = {name for members in groups.values() for name in members}
    names: dict[Any, str] = {}
    for key, members in groups.items():
        several = list(dict.fromkeys(members))
        left = set(several)
        for count in range(len(differing)):
            left = left if len(left) == 1 else {_leave_out(differing[: count + 1], name) for name in several}
        name, *others = left
        if others or name in taken - set(members):
            name = ", ".join(several)
        names[key] = name
        taken.add(name)
    for row in rows:
        row[column] = names[get_key(row)]


def _leave_out(variables: Sequence[str], name: str) -> str:
    parts = [part for part in name.split(SEPARATOR) if part.partition("=")[0] not in variables]
    return SEPARATOR.join(parts) or f"any {variables[0]}"


def _write_alike(rows: Sequence[dict[str, Any]], variables: Sequence[str]) -> None:
    """Write the values of a variable that has both words and numbers, such as `lora_alpha`, as text: files need it."""
    for key in variables:
        kinds = {isinstance(row[key], str) for row in rows if row[key] is not None}
        for row in rows if len(kinds) > 1 else ():
            row[key] = None if row[key] is None else format_value(row[key], key)


def _join_versions(manifest: Mapping[str, Any]) -> str:
    """Return the versions of packages as text; of one that training and evaluation had in two versions, both."""
    records = [manifest[stage].get("versions", {}) for stage in ("training", "evaluation")]
    made_with = dict.fromkeys(entry for record in records for entry in record.items())
    # Stable: of two versions of a package, the training's is the first.
    return " ".join(f"{package}={version}" for package, version in sorted(made_with, key=itemgetter(0)))


def _join_revisions(manifest: Mapping[str, Any]) -> str | None:
    """Return the revisions that trained and that evaluated as text. Earlier versions recorded that of the clean-up."""
    made_with = [manifest[stage].get("git_revision") for stage in ("training", "evaluation")]
    return " ".join(dict.fromkeys(filter(None, made_with))) or manifest["git_revision"]


def _plain(value: Any) -> Any:
    return format_value(value) if isinstance(value, list | dict) else value


def _is_fact(column: str) -> bool:
    return column.rpartition(":")[2] in FACTS


def _order(row: Mapping[str, Any], variables: Sequence[str]) -> tuple[Any, ...]:
    def rank(value: Any) -> tuple[int, float, str]:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and not pd.isna(value)
        return (0, float(value), "") if is_number else (1, 0.0, str(value))

    return (row["mode"] != "base", *(rank(row[key]) for key in variables), str(row["point"]), str(row["task"]))
