"""What a report says of `prune`: which trainings were stopped and why, and how near the best setting was to that."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lorasweep.experiment.pruning import count_kept
from lorasweep.experiment.sections import MODEL_KEY, SET_KEY, Data, Prune
from lorasweep.layout import TRAINING_LOG, get_decision_file
from lorasweep.results.labels import plain
from lorasweep.results.page import Cell, Column, Section, list_numbers
from lorasweep.results.table import PRUNED, leave_out_pruned
from lorasweep.util.files import find_record
from lorasweep.util.formats import format_score

KEEP = 0.5
"""The share by which it is told what `prune` would have done, where it did nothing."""


def read_decisions(results: Path, rungs: Sequence[int]) -> list[dict[str, Any]]:
    """Return the decisions of an experiment after the epochs `rungs`, in their order."""
    files = [get_decision_file(results, after) for after in rungs]
    return [record for file in files if (record := find_record(file))]


def list_stopped(
    table: pd.DataFrame, decisions: Sequence[Mapping[str, Any]], metric: str | None, labels: Mapping[str, str]
) -> Section | None:
    """Return a table of the points whose trainings were stopped; `None` if none was.

    `metric` is a column of the table, whose values are of the epoch after which they were stopped.
    """
    if PRUNED not in table or table[PRUNED].isna().all():
        return None
    rows = table[table[PRUNED].notna()].drop_duplicates("point")
    found = [_find_verdict(decisions, str(row["point"]), int(row[PRUNED])) for _, row in rows.iterrows()]
    numbers = [verdict.get("number") for verdict in found]
    columns = [
        Column("point", [Cell(labels[point], link=f"{point}/") for point in rows["point"]], "name"),
        Column("stopped after epoch", [Cell(str(plain(after))) for after in rows[PRUNED]]),
        Column("of epochs", [Cell(str(verdict.get("epochs", ""))) for verdict in found]),
        Column(
            "its number",
            [
                Cell("" if number is None else format_score(number), "" if number is None else number)
                for number in numbers
            ],
        ),
        Column("why", [Cell(verdict.get("why", "")) for verdict in found], "text"),
        *([list_numbers(rows, metric, f"{metric}, as it was then")] if metric else []),
    ]
    return Section("Stopped early", [], columns)


def look_back(
    results: Path,
    table: pd.DataFrame,
    best: str | None,
    decisions: Sequence[Mapping[str, Any]],
    prune: Prune | None,
    variables: Sequence[str],
) -> list[str]:
    """Return notes on how near the best setting was to being stopped, or would have been, as far as that is known.

    `best` is a `trained_setting` of the table.
    """
    finished = leave_out_pruned(table)
    own = finished[(finished["trained_setting"] == best) & (finished["mode"] != "base")]
    if best is None or own.empty:
        return []
    has_stopped = PRUNED in table and table[PRUNED].notna().any()
    unknown = " Whether a setting that was stopped would have become better is not known." if has_stopped else ""
    compared = _find_comparisons(decisions, {*own["point"]})
    places = [(after, verdict["rank"], verdict["rivals"]) for after, verdict in compared]
    places = places or _find_places(results, table, own, variables)
    if not places:
        return []
    told = ", ".join(f"{rank} of {rivals} after epoch {after}" for after, rank, rivals in places)
    what = "by what was compared" if compared else "by the validation loss"
    begin = f"Looking back: {what}, the best setting was number {told}."
    if compared and any(not each["stays"] for decision in decisions for each in decision["trainings"].values()):
        return [f"{begin}{_describe_border(compared)}{unknown}"]
    keep = prune.keep if prune and prune.keep < 1 else KEEP
    dropped = [after for after, rank, rivals in places if rank > count_kept(rivals, keep)]
    epochs = f" ({', '.join(map(str, dropped))})" if dropped else ""
    told = f"{len(dropped)} of {len(places)} epochs{epochs}"
    return [f"{begin} Prune with keep: {keep:g} and one comparison would have stopped it at {told}.{unknown}"]


def _find_verdict(decisions: Sequence[Mapping[str, Any]], point: str, after: int) -> Mapping[str, Any]:
    """Return the verdict that stopped a point's training; if it is not there, nothing."""
    for decision in decisions:
        for verdict in decision["trainings"].values():
            if point in verdict["points"] and not verdict["stays"]:
                return dict(verdict) if decision["after"] == after else {}
    return {}


def _find_comparisons(decisions: Sequence[Mapping[str, Any]], points: set[str]) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the epochs at which the setting of points was compared with others, with its verdicts."""
    found = []
    for decision in decisions:
        verdicts = [each for each in decision["trainings"].values() if points & {*each["points"]}]
        found += [(decision["after"], each) for each in verdicts[:1] if each["rank"] and each["rivals"] > 1]
    return found


def _describe_border(compared: Sequence[tuple[int, Mapping[str, Any]]]) -> str:
    """Return how near a setting was to being stopped by decisions, or that it was finished against one; "" if neither.

    At each epoch the decision's own share counts: `keep` may be another now.
    """
    border = sum(each["stays"] and each["rank"] == each["kept"] < each["rivals"] for _, each in compared)
    near = f" At {border} of {len(compared)} comparisons it was the last that went on." if border else ""
    against = [after for after, each in compared if not each["stays"]]
    if against:
        return f"{near} After epoch {against[0]} it was not among those that go on: it had been trained further before."
    return near


def _find_places(
    results: Path, table: pd.DataFrame, own: pd.DataFrame, variables: Sequence[str]
) -> list[tuple[int, int, int]]:
    """Return the place of a setting after each epoch before its last, by the validation losses in trainings' logs."""
    alike = [MODEL_KEY, SET_KEY, *(key for key in Data.model_fields if key not in ("train", "max_samples"))]
    # The log of an earlier epoch is the beginning of the last epoch's log.
    rivals = table.dropna(subset="recipe").sort_values("steps").drop_duplicates("recipe_sha256", keep="last")
    for key in alike:
        if key in variables:
            value = own.iloc[0][key]
            rivals = rivals[rivals[key].isna() if pd.isna(value) else rivals[key] == value]
    by_setting: dict[str, list[dict[int, float]]] = {}
    for _, row in rivals.iterrows():
        by_setting.setdefault(row["trained_setting"], []).append(_read_losses(results / row["point"]))
    same = rivals[rivals["recipe_sha256"].isin(own["recipe_sha256"])]
    if same.empty:  # an existing adapter
        return []
    name = same.iloc[0]["trained_setting"]
    # The losses of a training after the epoch at which it was stopped are not known.
    ends = [own.iloc[0]["epoch"] - 1, *(rivals[PRUNED].dropna() if PRUNED in rivals else ())]
    places = []
    for epoch in (epoch for epoch in sorted(by_setting[name][0]) if epoch <= min(ends)):
        means = {
            setting: sum(losses[epoch] for losses in members) / len(members)
            for setting, members in by_setting.items()
            if all(epoch in losses for losses in members)
        }
        if name in means and len(means) > 1:
            places.append((epoch, 1 + sum(mean < means[name] for mean in means.values()), len(means)))
    return places


def _read_losses(point: Path) -> dict[int, float]:
    """Return the validation loss after each epoch of a point's training."""
    file = point / "adapter" / TRAINING_LOG
    if not file.is_file():
        return {}
    rows = pd.read_csv(file).dropna(subset="validation_loss")
    return dict(zip(map(int, rows["epoch"]), map(float, rows["validation_loss"]), strict=True))
