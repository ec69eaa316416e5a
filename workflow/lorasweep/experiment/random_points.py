"""Draw points at random from a space of values, so that raising their number keeps the points drawn so far.

A drawn value depends only on the seed, its key and the number of the draw. The randomness is
`random.Random(text).random()`, the one sequence that Python guarantees to keep for a seed.
"""

import math
from collections.abc import Collection, Mapping
from random import Random
from typing import Any

from lorasweep.experiment.loading import parse_setting
from lorasweep.experiment.sections import Dimension, Sample
from lorasweep.util.errors import InputError

DIGITS = 3
"""Significant digits of drawn numbers other than integers, which appear in names of points."""

_DRAWS_PER_POINT = 1000
"""Draws per point after which the space is considered exhausted."""


def draw_points(sample: Sample, names: Mapping[str, Collection[str]]) -> list[dict[str, Any]]:
    """Return the values of distinct points, by key, in the order in which they are drawn.

    `names` are as for `parse_setting`.

    Raises:
        InputError: A key is unknown, a value is invalid, or the space has fewer points than requested.
    """
    space = {key: _parse_choices(key, dimension, names) for key, dimension in sample.space.items()}
    points: list[dict[str, Any]] = []
    seen: set[str] = set()
    draw = 0
    while len(points) < sample.points:
        if draw == _DRAWS_PER_POINT * (len(points) + 1):
            raise InputError(
                f"sample.points: {sample.points} is invalid: {draw} draws found {len(points)} points in sample.space",
                "at most that number, or a larger space",
            )
        point = {
            key: parse_setting(key, _draw(dimension, sample.seed, key, draw), f"sample.space.{key}", names)
            for key, dimension in space.items()
        }
        draw += 1
        name = repr(sorted(point.items()))
        if name not in seen:
            seen.add(name)
            points.append(point)
    return points


def _parse_choices(key: str, dimension: Dimension, names: Mapping[str, Collection[str]]) -> Dimension:
    """Check every choice, whether drawn or not, and return the dimension with parsed choices."""
    if dimension.choices is None:
        return dimension
    choices = [parse_setting(key, c, f"sample.space.{key}.{i}", names) for i, c in enumerate(dimension.choices)]
    return dimension.model_copy(update={"choices": choices})


def _draw(dimension: Dimension, seed: int, key: str, number: int) -> Any:
    share = Random(f"{seed}/{key}/{number}").random()
    if dimension.choices is not None:
        return dimension.choices[int(share * len(dimension.choices))]
    if bounds := dimension.int_uniform:
        return bounds[0] + int(share * (bounds[1] + 1 - bounds[0]))
    if bounds := dimension.int_log_uniform:
        return min(int(_between_logs(bounds[0], bounds[1] + 1, share)), bounds[1])
    if dimension.log_uniform:
        low, high = dimension.log_uniform
        value = _between_logs(low, high, share)
    else:
        assert dimension.uniform is not None
        low, high = dimension.uniform
        value = low + share * (high - low)
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def _between_logs(low: float, high: float, share: float) -> float:
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
