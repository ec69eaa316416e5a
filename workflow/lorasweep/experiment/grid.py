"""The combinations of values that make the points of a sweep: of `variables` and `sample`, less `exclude`."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorasweep.experiment.conditions import Condition
from lorasweep.experiment.loading import parse_setting
from lorasweep.experiment.random_points import draw_points
from lorasweep.experiment.sections import CHECKPOINT_KEYS, MODE_KEY, PROMPT_KEYS, SETTING_KEYS, Experiment, get_mode
from lorasweep.util.errors import InputError, nearest


def make_combinations(experiment: Experiment) -> list[dict[str, Any]]:
    """Return the values of each point that has no name of its own, by key, in the order of the file.

    Raises:
        InputError: an unknown or empty variable, a value that its key does not take, a `zip` of lists that do not fit,
            a space that `draw_points` refuses, an `exclude` that leaves nothing out.
    """
    variables = {
        key: [parse_setting(key, value, f"variables.{key}.{i}") for i, value in enumerate(values)]
        for key, values in experiment.variables.items()
    }
    axes = _make_axes(variables, experiment.zip)
    drawn: Collection[str] = ()
    if experiment.sample:
        drawn = experiment.sample.space.keys()
        if both := sorted(drawn & variables.keys()):
            raise InputError(f"sample.space.{both[0]}: is in 'variables' too", "one of the two")
        axes.append(draw_points(experiment.sample))
    check_mode({*variables, *drawn}, "variables" if MODE_KEY in variables else "sample.space")
    combinations = [_merge(parts) for parts in itertools.product(*axes)] if axes else []
    left_out: set[int] = set()
    for index, entry in enumerate(experiment.exclude):
        if isinstance(entry, str):
            left_out |= _find_true(entry, f"exclude.{index}", combinations, drawn, experiment)
        else:
            left_out |= _find_excluded(entry, f"exclude.{index}", combinations, variables, drawn)
    return [combination for index, combination in enumerate(combinations) if index not in left_out]


def check_mode(keys: Collection[str], where: str) -> None:
    """Refuse `mode` beside a key that it stands for; `where` names what has the keys.

    Raises:
        InputError: naming both.
    """
    if MODE_KEY in keys and (both := [key for key in CHECKPOINT_KEYS if key in keys]):
        raise InputError(f"{where}.{MODE_KEY}: stands for {both[0]} too", "one of the two")


def _make_axes(variables: Mapping[str, list[Any]], groups: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    """Return what varies independently, each with its values: a variable, or several that vary together."""
    together: dict[str, tuple[str, ...]] = {key: (key,) for key in variables}
    for index, group in enumerate(groups):
        where = f"zip.{index}"
        for position, key in enumerate(group):
            if key not in variables:
                raise InputError(
                    f"{where}: {key!r} is no variable{nearest(key, variables)}",
                    f"keys of variables: {', '.join(variables)}",
                )
            if together[key] != (key,) or key in group[:position]:
                raise InputError(f"{where}: {key!r} is in 'zip' already", "each variable once")
        if len({len(variables[key]) for key in group}) > 1:
            lengths = ", ".join(f"{key} has {len(variables[key])}" for key in group)
            raise InputError(f"{where}: {lengths} values", "variables with equally many values")
        together |= dict.fromkeys(group, tuple(group))
    axes = []
    for keys in dict.fromkeys(together.values()):
        rows = list(zip(*(variables[key] for key in keys), strict=True))
        for row in rows:
            if rows.count(row) > 1:
                shown = ", ".join(map(repr, row))
                raise InputError(f"variables.{'+'.join(keys)}: {shown} is listed twice", "distinct values")
        axes.append([dict(zip(keys, row, strict=True)) for row in rows])
    return axes


def _merge(parts: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    return {key: value for part in parts for key, value in part.items()}


def _find_excluded(
    entry: Mapping[str, Any],
    where: str,
    combinations: Sequence[Mapping[str, Any]],
    variables: Mapping[str, list[Any]],
    drawn: Collection[str],
) -> set[int]:
    """Return the indices of the combinations that have all values of an entry.

    One that speaks of a key that is `drawn` may find none: that is up to chance.
    """
    known = ", ".join([*variables, *drawn])
    parsed = {key: parse_setting(key, value, f"{where}.{key}") for key, value in entry.items()}
    for key, value in parsed.items():
        if key not in drawn and value not in variables.get(key, []):
            expected = f"one of {variables[key]}" if key in variables else f"keys of variables: {known}"
            raise InputError(f"{where}.{key}: {value!r} leaves nothing out", expected)
    found = {
        index
        for index, combination in enumerate(combinations)
        if all(combination[key] == value for key, value in parsed.items())
    }
    if not found and not parsed.keys() & set(drawn):
        raise InputError(f"{where}: {dict(entry)} leaves nothing out", "values that a point has together")
    return found


def _find_true(
    text: str,
    where: str,
    combinations: Sequence[Mapping[str, Any]],
    drawn: Collection[str],
    experiment: Experiment,
) -> set[int]:
    """Return the indices of the combinations of which a condition is true; what does not vary has its one value."""
    condition = Condition(text, SETTING_KEYS, where)
    special = dict.fromkeys(CHECKPOINT_KEYS, experiment.evaluation) | dict.fromkeys(PROMPT_KEYS, experiment.data)
    fixed = {key: getattr(special.get(key, experiment.controls), key) for key in SETTING_KEYS if key != MODE_KEY}

    def complete(combination: Mapping[str, Any]) -> dict[str, Any]:
        values = {**fixed, **combination}
        return values if MODE_KEY in values else values | {MODE_KEY: get_mode(*(values[k] for k in CHECKPOINT_KEYS))}

    found = {index for index, combination in enumerate(combinations) if condition.holds(complete(combination))}
    if not found and not condition.keys & set(drawn):
        raise InputError(f"{where}: {text!r} leaves nothing out", "what is true of a point")
    return found
