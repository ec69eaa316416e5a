"""The combinations of values that make a sweep's points: from `variables` and `sample`, less `exclude`."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorasweep.experiment.conditions import Condition
from lorasweep.experiment.interpolation import derive
from lorasweep.experiment.loading import parse_setting
from lorasweep.experiment.random_points import draw_points
from lorasweep.experiment.sections import (
    BASE_KEY,
    CHECKPOINT_KEYS,
    DATA_KEYS,
    MODE_KEY,
    MODEL_KEY,
    SET_KEY,
    SETTING_KEYS,
    TRAINER_KEY,
    Data,
    Experiment,
    get_mode,
    split_mode,
)
from lorasweep.util.errors import InputError, nearest


def make_combinations(experiment: Experiment) -> list[dict[str, Any]]:
    """Return the varied values of each point except the runs, by key, in the order of the file.

    Raises:
        InputError: A variable is unknown or empty, a value is invalid, the lists of a `zip` differ in length,
            `draw_points` fails, an entry of `exclude` matches no combination, or `check_set` fails.
    """
    names = experiment.names
    variables = {
        key: [parse_setting(key, value, f"variables.{key}.{i}", names) for i, value in enumerate(values)]
        for key, values in experiment.variables.items()
    }
    axes = _make_axes(variables, experiment.zip)
    drawn: Collection[str] = ()
    if experiment.sample:
        drawn = experiment.sample.space.keys()
        if both := sorted(drawn & variables.keys()):
            raise InputError(f"sample.space.{both[0]}: is also in 'variables'", "one of the two")
        axes.append(draw_points(experiment.sample, names))
    check_mode({*variables, *drawn}, "variables" if MODE_KEY in variables else "sample.space")
    combinations = [_merge(parts) for parts in itertools.product(*axes)] if axes else []
    left_out: set[int] = set()
    for index, entry in enumerate(experiment.exclude):
        if isinstance(entry, str):
            left_out |= _find_true(entry, f"exclude.{index}", combinations, drawn, experiment)
        else:
            left_out |= _find_excluded(entry, f"exclude.{index}", combinations, variables, drawn, names)
    kept = [combination for index, combination in enumerate(combinations) if index not in left_out]
    for combination in kept:
        check_set(experiment, combination, "variables" if SET_KEY in variables else "sample.space")
    return kept


def check_set(experiment: Experiment, values: Mapping[str, Any], where: str) -> None:
    """Check that no file is chosen twice: by a set of data and by a key of its own; `where` names their section.

    Raises:
        InputError: It is. The message names both.
    """
    if SET_KEY not in values:
        return
    name = values[SET_KEY]
    for key in DATA_KEYS:
        if key in values and key in experiment.data.sets[name].given:
            problem = f"{where}.{key}: {values[key]!r} contradicts {SET_KEY}: {name}, which has data.sets.{name}.{key}"
            raise InputError(problem, f"{SET_KEY} or {key}, not both")


def choose_data(experiment: Experiment, values: Mapping[str, Any]) -> Data:
    """Return the data of a point with these values."""
    own = {key: value for key, value in values.items() if key in Data.model_fields}
    return experiment.data.choose(values.get(SET_KEY), own)


def derive_controls(experiment: Experiment, values: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """Return the derived controls of a point with these values and these data.

    Raises:
        InputError: A derived control is made of itself.
    """
    derived = {key: text for key, text in experiment.derived.items() if key not in values}
    return derive(derived, {**vars(experiment.controls), **vars(data), **values}, "controls") if derived else {}


def check_mode(keys: Collection[str], where: str) -> None:
    """Check that `mode` is not set together with a key that it replaces; `where` names the section of the keys.

    Raises:
        InputError: Both are set. The message names them.
    """
    if MODE_KEY in keys and (both := [key for key in CHECKPOINT_KEYS if key in keys]):
        raise InputError(f"{where}.{MODE_KEY}: replaces {both[0]}, which is also set", "one of the two")


def _make_axes(variables: Mapping[str, list[Any]], groups: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    """Return the values of each axis of the grid: of a variable, or of several that vary together."""
    together: dict[str, tuple[str, ...]] = {key: (key,) for key in variables}
    for index, group in enumerate(groups):
        where = f"zip.{index}"
        for position, key in enumerate(group):
            if key not in variables:
                raise InputError(
                    f"{where}: {key!r} is not a variable{nearest(key, variables)}",
                    f"keys of variables: {', '.join(variables)}",
                )
            if together[key] != (key,) or key in group[:position]:
                raise InputError(f"{where}: {key!r} is already in 'zip'", "each variable once")
        if len({len(variables[key]) for key in group}) > 1:
            lengths = ", ".join(f"{key} has {len(variables[key])}" for key in group)
            raise InputError(f"{where}: {lengths} values", "variables with the same number of values")
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
    names: Mapping[str, Collection[str]],
) -> set[int]:
    """Return the indices of the combinations that have all values of an entry.

    An entry with a key that is `drawn` at random may match no combination.
    """
    keys = ", ".join([*variables, *drawn])
    parsed = {key: parse_setting(key, value, f"{where}.{key}", names) for key, value in entry.items()}
    for key, value in parsed.items():
        if key not in drawn and value not in variables.get(key, []):
            expected = f"one of {variables[key]}" if key in variables else f"keys of variables: {keys}"
            raise InputError(f"{where}.{key}: {value!r} excludes no point", expected)
    matches = {
        index
        for index, combination in enumerate(combinations)
        if all(combination[key] == value for key, value in parsed.items())
    }
    if not matches and not parsed.keys() & set(drawn):
        raise InputError(f"{where}: {dict(entry)} excludes no point", "values that a point has together")
    return matches


def _find_true(
    text: str,
    where: str,
    combinations: Sequence[Mapping[str, Any]],
    drawn: Collection[str],
    experiment: Experiment,
) -> set[int]:
    """Return the indices of the combinations that satisfy a condition. Keys that do not vary have their fixed value."""
    condition = Condition(text, SETTING_KEYS, where)
    special: dict[str, Any] = dict.fromkeys((*CHECKPOINT_KEYS, BASE_KEY), experiment.evaluation)
    special |= {**dict.fromkeys(Data.model_fields, experiment.data), TRAINER_KEY: experiment}
    keys = [key for key in SETTING_KEYS if key not in (MODE_KEY, MODEL_KEY, SET_KEY)]
    fixed = {key: getattr(special.get(key, experiment.controls), key) for key in keys}
    fixed |= {MODEL_KEY: None, SET_KEY: None}
    is_plain = not experiment.derived and not any(experiment.names.values())

    def complete(combination: Mapping[str, Any]) -> dict[str, Any]:
        values = {**fixed, **combination}
        if not is_plain:
            data = choose_data(experiment, combination)
            made = derive_controls(experiment, combination, data)
            made = {key: parse_setting(key, value, f"controls.{key}", {}) for key, value in made.items()}
            made[TRAINER_KEY] = experiment.choose_trainer(combination)
            values = {**fixed, **vars(data), **made, **combination}
        if MODE_KEY in values:
            return values | split_mode(values[MODE_KEY])
        return values | {MODE_KEY: get_mode(*(values[key] for key in CHECKPOINT_KEYS))}

    matches = {index for index, combination in enumerate(combinations) if condition.holds(complete(combination))}
    if not matches and not condition.keys & set(drawn):
        raise InputError(f"{where}: {text!r} excludes no point", "a condition that some point satisfies")
    return matches
