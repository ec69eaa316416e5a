"""The answer of a sweep: the best setting, its difference to the base model, and the confidence in both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from lorasweep.results.inference import adjust_p_values
from lorasweep.results.replicates import compare_settings
from lorasweep.results.table import SampleScores, is_metric
from lorasweep.util.errors import InputError

MOST_NAMED = 3
"""Maximum number of settings named in a sentence."""


@dataclass(frozen=True)
class Answer:
    """The answer for one metric on one task."""

    sentence: str
    task: str | None = None
    metric: str | None = None
    best: str | None = None
    """The setting with the best mean."""
    is_winner: bool = False
    """Whether the best setting differs significantly from every other setting."""
    p_values: dict[str, float] | None = None
    """p-value of no difference to the best setting, by setting, corrected for all pairs of settings."""
    caveats: tuple[str, ...] = ()
    """Limitations that a reader should know before quoting the sentence."""

    def as_plain(self) -> dict[str, Any]:
        """Return the answer as a dict of plain values."""
        return asdict(self)


def choose_metric(table: pd.DataFrame, tasks: Sequence[str], metric: str | None) -> str | None:
    """Return the metric that decides, on the first of `tasks`: `metric` if it is set, or the task's first metric.

    Raises:
        InputError: the task has no such metric.
    """
    if not tasks or "task" not in table:
        return None
    rows = table[table["task"] == tasks[0]]
    names = [column for column in table.columns if is_metric(column) and rows[column].notna().any()]
    if metric and metric not in names:
        raise InputError(f"report.metric: {metric!r} is no metric of the task '{tasks[0]}'", ", ".join(names))
    return metric or next(iter(names), None)


def find_answer(
    table: pd.DataFrame,
    settings: pd.DataFrame,
    scores: SampleScores,
    task: str | None,
    metric: str | None,
    higher_is_better: bool,
    confidence: float,
) -> Answer:
    """Return the answer from the tables of points (`table`) and of settings (`settings`, see `replicates.aggregate`).

    A setting wins if it differs from every other one at the level 1 - confidence, corrected for multiple comparisons.
    """
    if task is None:
        return Answer("The points were not evaluated, so there is no best one.")
    if metric is None or metric not in settings:
        return Answer(f"No point has a value of a metric on {task}.", task)
    rows = settings[(settings["task"] == task) & settings[metric].notna()]
    rivals = rows[rows["mode"] != "base"].sort_values(metric, ascending=not higher_is_better, kind="stable")
    if rivals.empty:
        return Answer(f"No point has a value of {metric} on {task}.", task, metric)
    records: list[Any] = rivals.to_dict("records")
    best, *others = records
    level = 1 - confidence
    p_values = [compare_settings(best, other, metric, table, scores) for other in others]
    tested = [p for p in p_values if p is not None]
    # The best setting was selected on the same data, so the correction counts all pairs, not only those with the best.
    adjusted = iter(adjust_p_values([min(1.0, p * len(rivals) / 2) for p in tested]))
    corrected = {
        str(other["setting"]): next(adjusted) for other, p in zip(others, p_values, strict=True) if p is not None
    }
    names = [str(other["setting"]) for other in others]
    tied = [name for name in names if corrected.get(name, 1.0) > level]
    is_winner = bool(others) and not tied
    sentence = f"{_name_best(best, metric, task, confidence)}{_tell_rest(names, tied, corrected)}"
    sentence += _tell_delta(best, metric, task, level, higher_is_better)
    caveats = (
        *_find_absent(settings, rivals, task),
        *_get_caveats(best, others, metric),
        *_find_rank_caveat(table[table["task"] == task]),
    )
    return Answer(sentence, task, metric, str(best["setting"]), is_winner, corrected, caveats)


def _name_best(best: Mapping[str, Any], metric: str, task: str, confidence: float) -> str:
    interval = ""
    if not _is_missing(best.get(f"{metric}:low")):
        interval = (
            f" ({confidence:.0%} interval {best[f'{metric}:low']:.3f} to {best[f'{metric}:high']:.3f}"
            + (f", {best['seeds']} seeds" if best["seeds"] > 1 else "")
            + ")"
        )
    return f"{best['setting']} scores best on {task}: {metric} {best[metric]:.3f}{interval}"


def _tell_rest(rest: Sequence[str], tied: Sequence[str], p_values: Mapping[str, float]) -> str:
    if not rest:
        return ""
    if not p_values:
        return "; differences between settings cannot be tested, so no winner is named"
    if not tied:
        many = f"than each of the {len(rest)} other settings" if len(rest) > 1 else f"than {rest[0]}"
        return f", better {many} ({_format_p(max(p_values.values()))})"
    named = ", ".join(f"{setting}{_tell_p(p_values.get(setting))}" for setting in tied[:MOST_NAMED])
    more = f" and {len(tied) - MOST_NAMED} more" if len(tied) > MOST_NAMED else ""
    of = f"{len(tied)} of {len(rest)} others" if len(tied) < len(rest) else "any other setting"
    if len(rest) == 1:
        of = "the other setting"
    return f", but not significantly better than {of}: {named}{more}"


def _tell_p(p_value: float | None) -> str:
    return f" ({_format_p(p_value)})" if p_value is not None else ""


def _tell_delta(best: Mapping[str, Any], metric: str, task: str, level: float, higher_is_better: bool) -> str:
    delta: Any = best.get(f"{metric}:delta")
    if _is_missing(delta):
        return "."
    where = "above" if delta > 0 else "below"
    interval = ""
    if not _is_missing(best.get(f"{metric}:delta_low")):
        low, high = best[f"{metric}:delta_low"], best[f"{metric}:delta_high"]
        interval = f" ({low:+.3f} to {high:+.3f})"
    p_value: Any = best.get(f"{metric}:p_adjusted")
    if not interval and _is_missing(p_value):
        return f". The difference to the base model is {delta:+.3f} (not tested)."
    covers_none = bool(interval) and low <= 0 <= high
    if delta == 0 or covers_none or (not _is_missing(p_value) and p_value > level):
        p_text = "" if _is_missing(p_value) else f", {_format_p(p_value)}"
        # The difference is significant by itself, but not after the correction.
        many = " after correction" if not _is_missing(p_value) and best[f"{metric}:p"] <= level < p_value else ""
        return f". The difference to the base model is {delta:+.3f}{interval}{p_text}: not significant{many}."
    p_text = "" if _is_missing(p_value) else f", {_format_p(p_value)}"
    bad = " It is worse than the base model." if (delta > 0) != higher_is_better else ""
    return f". It is {abs(delta):.3f} {where} the base model{interval}{p_text}.{bad}"


def _get_caveats(best: Mapping[str, Any], others: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, ...]:
    caveats = []
    if others:
        caveats.append(
            f"{len(others) + 1} settings were compared: p-values are corrected for that, but intervals are not, and "
            "the best of many settings looks better than it is."
        )
    seeds = [int(row["seeds"]) for row in (best, *others)]
    if 1 == min(seeds) < max(seeds):
        caveats.append("Some settings were trained once: they are compared by their samples only.")
    if max(seeds) == 1:
        caveats.append(
            "Each setting was trained once: the intervals cover the samples only, not the variation between seeds. "
            "Make seed a variable to measure it."
        )
    if _is_missing(best.get(f"{metric}:low")):
        caveats.append("This metric is not a mean over varying samples, so it has no interval here.")
    return tuple(caveats)


def _find_absent(settings: pd.DataFrame, rivals: pd.DataFrame, task: str) -> tuple[str, ...]:
    """Return a note if some settings were not evaluated on the deciding task."""
    others = settings[settings["mode"] != "base"]
    absent = others["setting"].nunique() - rivals["setting"].nunique()
    if not absent:
        return ()
    were = "1 setting was" if absent == 1 else f"{absent} settings were"
    return (f"{were} not evaluated on {task}, and not compared.",)


def _find_rank_caveat(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return a note if ranks are compared at one learning rate: its best value depends on the scale of the update."""
    if "lora_rank" not in rows or rows["lora_rank"].nunique() < 2:
        return ()
    if "lr" in rows and rows.groupby("lora_rank")["lr"].nunique().min() > 1:
        return ()
    return (
        "Ranks were compared at one learning rate: a rank that does worse may need another one, as the scale of its "
        "update (alpha / r) decides. Make lr a variable too, or see docs/how-to/trainers.md.",
    )


def _format_p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))
