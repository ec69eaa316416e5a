"""The answer of a sweep: the best setting, its difference to the base model, and the confidence in both."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lorasweep.experiment.points import format_value
from lorasweep.results.inference import POWER, Scores, adjust_p_values, count_needed_samples
from lorasweep.results.replicates import collect_scores, compare_settings, count_modes_once, get_base_row
from lorasweep.results.table import SampleScores, find_base, leave_out_pruned, list_metrics
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
    """The setting with the best mean, without its mode if modes share its adapter; `None` if several are equal."""
    equal: tuple[str, ...] = ()
    """The settings that share the best mean, if there are several; of a single setting, its modes."""
    is_winner: bool = False
    """Whether the best setting differs significantly from every other setting."""
    p_values: dict[str, float] | None = None
    """p-value of no difference to the best setting, by setting, corrected for all pairs of settings."""
    caveats: tuple[str, ...] = ()
    """Limitations that a reader should know before quoting the sentence."""

    def as_plain(self) -> dict[str, Any]:
        """Return the answer as a dict of plain values."""
        return asdict(self)


def choose_metric(results: Path, table: pd.DataFrame, tasks: Sequence[str], metric: str | None) -> str | None:
    """Return the metric that decides, on the first of `tasks`: `metric` if it is set, or the task's first metric.

    Raises:
        InputError: the task has no such metric.
    """
    if not tasks or "task" not in table:
        return None
    names = list_metrics(results, table, tasks[0])
    if metric and names and metric not in names:
        raise InputError(f"report.metric: {metric!r} is no metric of the task '{tasks[0]}'", ", ".join(names))
    return metric or next(iter(names), None)


def find_answer(
    table: pd.DataFrame,
    settings: pd.DataFrame,
    scores: SampleScores,
    variables: Sequence[str],
    task: str | None,
    metric: str | None,
    higher_is_better: bool,
    confidence: float,
    cluster: str | None = None,
) -> Answer:
    """Return the answer from the tables of points (`table`) and of settings (`settings`, see `replicates.aggregate`).

    Modes that share an adapter are one setting, with the scores of the one with the most seeds, or of these the first.
    Settings whose trainings were stopped (`prune`) are not compared with those that were trained to their ends. A
    setting wins if it differs from every other one at the level 1 - confidence, corrected for multiple comparisons.
    `cluster` is `report.cluster`.
    """
    if task is None:
        return Answer("The points were not evaluated, so there is no best one.")
    if metric is None or metric not in settings:
        return Answer(f"No point has a value of a metric on {task}.", task)
    tried = settings[(settings["task"] == task) & (settings["mode"] != "base")]
    settings = leave_out_pruned(settings)
    rows = settings[(settings["task"] == task) & settings[metric].notna() & (settings["mode"] != "base")]
    if rows.empty:
        return Answer(f"No point has a value of {metric} on {task}.", task, metric)
    distinct = count_modes_once(rows).sort_values(metric, ascending=not higher_is_better, kind="stable")
    records: list[Any] = distinct.to_dict("records")
    is_best = np.isclose(distinct[metric].astype(float), float(records[0][metric]), rtol=1e-9, atol=1e-12)
    best = [row for row, is_equal in zip(records, is_best, strict=True) if is_equal]
    others = records[len(best) :]
    level = 1 - confidence
    p_values = [_compare_to_all(other, best, metric, table, scores) for other in others]
    tested = [p for p in p_values if p is not None]
    # The best setting was selected on the same data, so the correction counts all pairs, not only those with the best.
    adjusted = iter(adjust_p_values([min(1.0, p * len(records) / 2) for p in tested]))
    names = [str(other["trained_setting"]) for other in others]
    corrected = {name: next(adjusted) for name, p in zip(names, p_values, strict=True) if p is not None}
    tied = [name for name in names if corrected.get(name, 1.0) > level]
    together = _describe_together(best, metric)
    equal = [str(row["trained_setting"]) for row in best]
    if len(records) == 1 and np.ptp(rows[metric].astype(float)) < 1e-12:
        equal = list(map(str, rows["setting"]))
    sentence = _name_best(equal, together, metric, task, confidence) + _tell_rest(names, tied, corrected)
    sentence += _tell_delta(together, metric, task, level, higher_is_better, is_plural=len(equal) > 1)
    # Of what is not significant, the next setting and the base model, with the level that the correction leaves them.
    count = len(records)
    next_ones = [(name, row) for name, row in zip(names, others, strict=True) if name in tied]
    close = [(name, row, 2 * level / count / (count - 1)) for name, row in next_ones[:1]]
    p_value: Any = together.get(f"{metric}:p_adjusted")
    if not _is_missing(p_value) and p_value > level:
        close.append(("the base model", get_base_row(best[0]), level / count))
    own = collect_scores(best[0], metric, table, scores)
    caveats = (
        *_find_absent(settings, rows, task),
        *_find_pruned(tried),
        *_find_unscored(leave_out_pruned(table[table["task"] == task]), task, metric),
        *_get_caveats(best[0], others, metric),
        *_find_mode_caveat(rows, best, metric),
        *_find_edge_caveats(tried, best, variables),
        *_find_rank_caveat(leave_out_pruned(table[table["task"] == task])),
        *_find_seed_caveats(records, metric, table, scores),
        *_find_sample_caveats(own, close, metric, table, scores),
        *_find_cluster_caveat(together, metric, task, cluster, scores, bool(own.samples)),
    )
    is_alone = len(equal) == 1
    is_winner = is_alone and bool(others) and not tied
    alone, several = (equal[0], ()) if is_alone else (None, tuple(equal))
    return Answer(sentence, task, metric, alone, several, is_winner, corrected, caveats)


def _compare_to_all(
    other: Mapping[str, Any],
    best: Sequence[Mapping[str, Any]],
    metric: str,
    table: pd.DataFrame,
    scores: SampleScores,
) -> float | None:
    """Return the largest p-value of no difference between a setting and each of the best."""
    p_values = [compare_settings(row, other, metric, table, scores) for row in best]
    return None if None in p_values else max(p for p in p_values if p is not None)


def _describe_together(best: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Return a row for settings of one mean: of their intervals and p-values, the widest and the largest.

    Settings of different base models have no gain in common, and the row has none.
    """
    frame = pd.DataFrame(best)
    together = dict(best[0])
    if len(set(map(find_base, best))) > 1:
        gains = (f"{metric}:delta", f"{metric}:p")
        return {key: value for key, value in together.items() if not key.startswith(gains)}
    for fact, summarise in (("low", "min"), ("high", "max"), ("p", "max"), ("p_adjusted", "max")):
        for column in (f"{metric}:{fact}", f"{metric}:delta_{fact}"):
            if column in frame:
                values = pd.to_numeric(frame[column])
                together[column] = None if values.isna().any() else float(getattr(values, summarise)())
    return together


def _name_best(names: Sequence[str], row: Mapping[str, Any], metric: str, task: str, confidence: float) -> str:
    interval = ""
    if not _is_missing(row.get(f"{metric}:low")):
        interval = (
            f" ({confidence:.0%} interval {row[f'{metric}:low']:.3f} to {row[f'{metric}:high']:.3f}"
            + (f", {row['seeds']} seeds" if row["seeds"] > 1 else "")
            + ")"
        )
    if len(names) == 1 and names[0] in ("any mode", "any seed"):
        return f"The only setting scores on {task}: {metric} {row[metric]:.3f}{interval}"
    scored = f"on {task}: {metric} {row[metric]:.3f}{interval}"
    if len(names) == 1:
        return f"{names[0]} scores best {scored}"
    shown = [*names[:MOST_NAMED], *([f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]} score equally {scored}"


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


def _tell_delta(
    best: Mapping[str, Any], metric: str, task: str, level: float, higher_is_better: bool, is_plural: bool
) -> str:
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
    they = "They are" if is_plural else "It is"
    bad = f" {they} worse than the base model." if (delta > 0) != higher_is_better else ""
    return f". {they} {abs(delta):.3f} {where} the base model{interval}{p_text}.{bad}"


def _get_caveats(best: Mapping[str, Any], others: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, ...]:
    caveats = []
    if others:
        caveats.append(
            f"{len(others) + 1} settings were compared: p-values are corrected for that, but intervals are not, and "
            "the best of many settings looks better than it is."
        )
    seeds = [int(row["seeds"]) for row in (best, *others)]
    if 1 == min(seeds) < max(seeds):
        caveats.append("Some settings were trained once: their seeds are taken to vary as those of the others.")
    if max(seeds) == 1:
        caveats.append(
            "Each setting was trained once: the intervals cover the samples only, not the variation between seeds. "
            "Make seed a variable to measure it."
        )
    if max(seeds) == 2:
        caveats.append("Two seeds tell little of how much seeds vary: a third makes intervals about half as wide.")
    if _is_missing(best.get(f"{metric}:low")):
        caveats.append("This metric is not a mean over varying samples, so it has no interval here.")
    return tuple(caveats)


def _find_mode_caveat(rows: pd.DataFrame, best: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, ...]:
    """Return a note if a best setting has other scores in other modes, which share its adapters of all seeds."""
    for row in best:
        alike = rows[(rows["trained_setting"] == row["trained_setting"]) & (rows["seeds"] == row["seeds"])]
        if float(alike[metric].max() - alike[metric].min()) > 1e-9:
            each = ", ".join(f"{value:.3f} in {mode}" for mode, value in zip(alike["mode"], alike[metric], strict=True))
            name = row["trained_setting"]
            return (f"{name} has one adapter, but its modes differ in {metric}: {each}. The first counts.",)
    return ()


def _find_edge_caveats(
    rows: pd.DataFrame, best: Sequence[Mapping[str, Any]], variables: Sequence[str]
) -> tuple[str, ...]:
    """Return a note for each numeric variable of three values or more of which the best one is the first or last."""
    caveats = []
    for key in variables:
        values = sorted(set(rows[key].dropna())) if key in rows and pd.api.types.is_numeric_dtype(rows[key]) else []
        if len(values) < 3:
            continue
        found = {row[key] for row in best}
        for edge, extreme, more in ((values[0], "smallest", "smaller"), (values[-1], "largest", "larger")):
            if found == {edge}:
                number = format_value(edge.item() if hasattr(edge, "item") else edge, key)
                caveats.append(
                    f"The best {key}, {number}, is the {extreme} of {len(values)} that were tried: "
                    f"{more} ones may be better."
                )
    return tuple(caveats)


def _find_absent(settings: pd.DataFrame, rivals: pd.DataFrame, task: str) -> tuple[str, ...]:
    """Return a note if some settings were not evaluated on the deciding task."""
    others = settings[settings["mode"] != "base"]
    absent = others["setting"].nunique() - rivals["setting"].nunique()
    if not absent:
        return ()
    were = "1 setting was" if absent == 1 else f"{absent} settings were"
    return (f"{were} not evaluated on {task}, and not compared.",)


def _find_pruned(tried: pd.DataFrame) -> tuple[str, ...]:
    """Return a note if the trainings of some settings were stopped."""
    stopped = set(tried["trained_setting"]) - set(leave_out_pruned(tried)["trained_setting"])
    if not stopped:
        return ()
    were = "1 setting was" if len(stopped) == 1 else f"{len(stopped)} settings were"
    return (f"{were} stopped early (prune), and not compared: how good they would have become is not known.",)


def _find_unscored(rows: pd.DataFrame, task: str, metric: str) -> tuple[str, ...]:
    """Return a note if some answers have no score."""
    column = f"{metric}:unscored"
    count = int(rows[column].sum()) if column in rows else 0
    if not count:
        return ()
    answers = int(rows.loc[rows[metric].notna(), "samples"].sum())
    return (
        f"{count} of {answers} answers on {task} have no score, such as those of which a judge's verdict could not be "
        f"read: {metric} leaves them out.",
    )


def _find_rank_caveat(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return a note if ranks are compared at one learning rate, while the scale of the update does not fall with the
    rank, as with alpha = 2r: updates then grow with the rank, and the best learning rate falls."""
    if "lora_rank" not in rows or rows["lora_rank"].nunique() < 2:
        return ()
    if "lr" in rows and rows["lr"].nunique() > 1:
        return ()
    scales = rows.dropna(subset="lora_rank").groupby("lora_rank")["lora_scale"].max().sort_index()
    if scales.iloc[-1] < scales.iloc[0]:
        return ()
    return (
        "Ranks were compared at one learning rate, and alpha grows with the rank: so do the updates, and a high rank "
        "that does worse may need a lower lr. Make lr a variable too, or keep alpha constant "
        "(docs/how-to/trainers.md).",
    )


def _find_seed_caveats(
    records: Sequence[Mapping[str, Any]], metric: str, table: pd.DataFrame, scores: SampleScores
) -> tuple[str, ...]:
    """Return a note if trainings of one setting differ more than settings do."""
    found = [collect_scores(row, metric, table, scores) for row in records]
    trained = [each.by_training for each in found if each.seeds > 1]
    if len(trained) < 2:
        return ()
    within = float(np.sqrt(np.mean([means.var(ddof=1) for means in trained])))
    between = float(np.std([means.mean() for means in trained], ddof=1))
    if within <= between:
        return ()
    return (
        f"Seeds differ more than settings: the standard deviation of {metric} is {within:.3f} between seeds of one "
        f"setting, and {between:.3f} between settings.",
    )


def _find_sample_caveats(
    own: Scores,
    close: Sequence[tuple[str, Mapping[str, Any], float]],
    metric: str,
    table: pd.DataFrame,
    scores: SampleScores,
) -> tuple[str, ...]:
    """Return a note of how many samples would tell the best setting from those that are close.

    `own` are the best setting's scores; `close` has names, rows and levels of significance.
    """
    caveats = []
    for name, row, level in close:
        other = collect_scores(row, metric, table, scores)
        needed = count_needed_samples(own, other, level)
        if needed and needed > len(own.samples):
            caveats.append(
                f"{len(own.samples)} samples are too few to tell the best setting from {name}: a difference of "
                f"{abs(own.mean - other.mean):.3f} takes about {float(f'{needed:.2g}'):,.0f} to be found with a "
                f"probability of {POWER:.0%}."
            )
    return tuple(caveats)


def _find_cluster_caveat(
    best: Mapping[str, Any], metric: str, task: str, cluster: str | None, scores: SampleScores, is_mean: bool
) -> tuple[str, ...]:
    """Return a note if samples are taken as independent, or have no part in the interval."""
    if _is_missing(best.get(f"{metric}:low")) or scores.has_clusters(task):
        return ()
    if not is_mean:
        return ("The interval covers seeds only: this metric is not a mean over samples.",)
    if cluster:
        return (f"Samples of {task} have no {cluster} in their metadata: they are taken as independent.",)
    return (
        "Samples are taken as independent. If several are about one text, name the key of their metadata that tells "
        "the text as report.cluster.",
    )


def _format_p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"


def _is_missing(value: Any) -> bool:
    return value is None or bool(pd.isna(value))
