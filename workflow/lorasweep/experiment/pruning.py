"""The rule by which trainings stop before their last epoch (`prune`): which settings compete, and which of them go on.

It has no state: the same numbers give the same decision, in whatever order they come.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING

from lorasweep.experiment.sections import BASE_KEY, MODE_KEY, Experiment, Prune
from lorasweep.util.errors import InputError

if TYPE_CHECKING:
    from lorasweep.experiment.points import Point

_TOLERANCE = 1e-9
"""Rounding errors of `keep` times a number of settings: 0.7 x 10 is 7."""

_MOST_NAMED = 3


@dataclass(frozen=True)
class Candidate:
    """A training that competes at a rung: the end of an epoch after which settings are compared."""

    training: str
    setting: str
    """What it shares with the trainings that differ from it in their seed alone."""
    rivals: str
    """What it shares with the trainings whose numbers can be compared with its own."""
    number: float | None
    """What is compared; `None` if it is not known, for a training that went further without it."""
    has_diverged: bool = False
    keeps_place: bool = False
    """Whether it was let go on by an earlier decision, whose place it keeps if it has no number now."""
    is_awaited: bool = False
    """Whether it will have a number."""

    @property
    def is_counted(self) -> bool:
        return self.has_diverged or self.is_awaited or self.number is not None


@dataclass(frozen=True)
class Verdict:
    """Whether a training goes on, and why."""

    stays: bool
    number: float | None
    """The mean of its setting's numbers; `None` if the setting has none, or one of its trainings diverged."""
    seeds: int
    """Number of trainings that the mean is over."""
    rank: int | None
    """Place of its setting among its rivals, from 1; equal ones have the same. `None` if it is not compared."""
    rivals: int
    """Number of settings that compete or keep their places, its own included."""
    kept: int
    """Number of them that go on, but for ties at the border."""
    has_diverged: bool = False
    """Whether a training of the setting diverged."""
    keeps_place: bool = False
    """Whether the setting goes on as an earlier decision let it go on, and it cannot be compared any more."""


def get_setting_key(point: Point) -> str:
    """Return what a training shares with its replicates: its settings but the seed, and what is no part of it."""
    settings = {key: value for key, value in point.settings.items() if key not in ("seed", MODE_KEY, BASE_KEY)}
    return json.dumps([settings, point.model.model_dump(), point.trainer], sort_keys=True, default=str)


def get_rivals_key(point: Point, prune: Prune) -> str:
    """Return what a training shares with those whose numbers can be compared with its own: the base model, and for
    losses, the tokens that they are means over."""
    key = [point.model.model_dump()]
    if prune.task is None:
        data = point.data.model_dump(exclude={"train", "max_samples"})
        cut = point.controls.max_seq_len if point.data.too_long != "error" else None
        key += [{**data, "validation": list(point.data.get_files("validation")), "max_seq_len": cut}]
    return json.dumps(key, sort_keys=True, default=str)


def count_kept(settings: int, keep: float) -> int:
    """Return how many of so many settings go on, but for ties at the border."""
    return max(1, ceil(keep * settings - _TOLERANCE))


def decide(candidates: Iterable[Candidate], keep: float, *, higher_is_better: bool) -> dict[str, Verdict] | None:
    """Return the verdict on each training, by its name; `None` if it depends on a number that is awaited.

    A setting in which a training diverged is behind all others. A setting without any number goes on: its trainings
    went further before. It takes a place from others only if an earlier decision let it go on: what that decision
    stopped stays so, but what was finished before any decision does not keep new settings from going on.
    """
    by_rivals: dict[str, dict[str, list[Candidate]]] = {}
    for candidate in candidates:
        by_rivals.setdefault(candidate.rivals, {}).setdefault(candidate.setting, []).append(candidate)
    verdicts: dict[str, Verdict] = {}
    for settings in by_rivals.values():
        counted = {key: [each for each in members if each.is_counted] for key, members in settings.items()}
        places = {key: _get_place(members, higher_is_better) for key, members in counted.items() if members}
        held = {key for key in settings.keys() - places if any(each.keeps_place for each in settings[key])}
        ordered = sorted([*places.values(), *(-inf for _ in held)])
        kept = count_kept(len(ordered), keep) if ordered else 0
        awaited = {key for key, members in settings.items() if any(each.is_awaited for each in members)}
        if awaited and len(held) < kept:
            return None
        for key, members in settings.items():
            own, has_diverged = counted[key], any(each.has_diverged for each in members)
            is_known = bool(own) and key not in awaited
            verdict = Verdict(
                stays=not own or places[key] <= ordered[kept - 1],
                number=_get_mean(own) if is_known and not has_diverged else None,
                seeds=len(own),
                rank=1 + bisect_left(ordered, places[key]) if is_known else None,
                rivals=len(ordered),
                kept=kept,
                has_diverged=has_diverged,
                keeps_place=key in held,
            )
            verdicts |= {each.training: verdict for each in members}
    return dict(sorted(verdicts.items()))


def _get_place(members: Sequence[Candidate], higher_is_better: bool) -> float:
    """Return the mean of a setting's numbers; of settings, the one with the lowest place is the best."""
    if any(each.has_diverged or each.is_awaited for each in members):
        return inf
    mean = _get_mean(members)
    return -mean if higher_is_better else mean


def _get_mean(members: Sequence[Candidate]) -> float:
    # Sorted, as a sum of floats depends on the order.
    return sum(sorted(each.number for each in members if each.number is not None)) / len(members)


def expect_shares(points: Mapping[str, Point], prune: Prune) -> dict[str, list[float]]:
    """Return what share of each trained point's parts will be trained, by the point's name, if all are alike.

    A training has a part before each rung, and a last one.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for name, point in points.items():
        if point.is_trained:
            groups.setdefault(get_rivals_key(point, prune), {}).setdefault(get_setting_key(point), []).append(name)
    shares: dict[str, list[float]] = {}
    for settings in groups.values():
        left = [len(settings)]
        for _ in prune.after:
            left.append(count_kept(left[-1], prune.keep))
        shares |= {name: [number / left[0] for number in left] for names in settings.values() for name in names}
    return shares


def check_pruning(experiment: Experiment, points: Iterable[Point]) -> None:
    """Check that `prune` goes with the rest of an experiment.

    Raises:
        InputError: it does not.
    """
    prune = experiment.prune
    if prune is None:
        return
    if experiment.evaluation.epochs != "last":
        raise InputError(
            f"prune: does not go with evaluation.epochs: {experiment.evaluation.epochs}, as a training that stops has "
            "no later epochs",
            "evaluation.epochs: last; or no prune",
        )
    trained = [point for point in points if point.is_trained]
    if short := [point for point in trained if point.controls.epochs <= prune.after[-1]]:
        more = f" and {len(short) - _MOST_NAMED} more" if len(short) > _MOST_NAMED else ""
        named = ", ".join(f"'{point.name}'" for point in short[:_MOST_NAMED])
        raise InputError(
            f"prune.after: {prune.after[-1]} is not before the last epoch of {named}{more} (controls.epochs: "
            f"{min(point.controls.epochs for point in short)})",
            f"epochs below {min(point.controls.epochs for point in short)}",
        )
    if prune.task is None and (without := next((point for point in trained if not point.data.validation), None)):
        raise InputError(
            f"prune.by: 'validation_loss' is invalid without data.validation (point '{without.name}')",
            "a file of held-out samples under data.validation; or by: {task: ...}",
        )
