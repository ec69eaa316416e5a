"""Trainings: one for all points that differ only in how their checkpoint is kept, or in the epoch that they are of.

A training is that of a recipe. Its folder, `trainings/<name>/` of an experiment, is called after the recipe's digest,
so what lies in it is of that recipe for ever: another recipe has another folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lorasweep.experiment.points import SEPARATOR, Point
from lorasweep.experiment.sections import MODE_KEY
from lorasweep.layout import ADAPTER_WEIGHTS, RECORD, STATE, TRAININGS, get_epoch_folder
from lorasweep.util.digest import digest_file

_DIGITS = 10
"""Of a digest in a name: 10,000 trainings have two alike once in 20,000 times."""

_NAME = re.compile(rf"(?P<label>.+)-(?P<key>[0-9a-f]{{{_DIGITS}}}(?:-[0-9a-f]{{4}})?)")


def share_trainings(points: Mapping[str, Point], get_recipe: Callable[[Point], str], results: Path) -> dict[str, Point]:
    """Return the points with the name of their training, and with the point that it is counted for.

    `get_recipe` returns a recipe without the name of its training; `results` is the experiment's folder, where a
    training that kept all the epochs that are wanted now is taken as it is.
    """
    groups: dict[str, list[Point]] = {}
    for point in points.values():
        if not point.adapter:
            digest = hashlib.sha256(get_recipe(point).encode()).hexdigest()[:_DIGITS]
            groups.setdefault(digest, []).append(point)
    folders = _list_folders(results / TRAININGS)
    shared = dict(points)
    for digest, members in groups.items():
        # The order of the file is of no matter.
        members.sort(key=lambda point: point.name)
        owner = next(point for point in members if point.epoch is None)
        epochs = sorted({point.epoch for point in members if point.epoch is not None})
        name = _find_name(folders.get(digest, ()), digest, epochs) or _make_name(owner, digest, epochs)
        for point in members:
            shared[point.name] = replace(point, training=name, trained_by=None if point is owner else owner.name)
    return shared


def is_trained(folder: Path, epochs: Iterable[int] = ()) -> bool:
    """Whether a training's folder has the adapter of its last epoch, and those of earlier ones."""
    adapters = [folder / "adapter", *(folder / get_epoch_folder(epoch) for epoch in epochs)]
    return all((adapter / name).is_file() for adapter in adapters for name in (ADAPTER_WEIGHTS, RECORD))


def drop_unused(trainings: Path, current: Collection[str]) -> None:
    """Remove what no point has of trainings that left the experiment: their states, and adapters that none took.

    `trainings` is the folder of all, and `current` are the names of those that stay.
    """
    left = list(trainings.iterdir()) if trainings.is_dir() else []
    left = [folder for folder in left if folder.name not in current and _NAME.fullmatch(folder.name)]
    taken = {digest_file(recipe) for recipe in trainings.parent.glob("*/recipe.yaml")} if left else set()
    for folder in left:
        recipe = folder / "recipe.yaml"
        shutil.rmtree(folder / STATE, ignore_errors=True)
        if not recipe.is_file() or digest_file(recipe) not in taken:
            shutil.rmtree(folder, ignore_errors=True)


def _list_folders(trainings: Path) -> dict[str, list[Path]]:
    """Return the folders of trainings by the digests of their recipes."""
    folders: dict[str, list[Path]] = {}
    for folder in sorted(trainings.glob("*")) if trainings.is_dir() else ():
        if match := _NAME.fullmatch(folder.name):
            folders.setdefault(match["key"][:_DIGITS], []).append(folder)
    return folders


def _find_name(folders: Iterable[Path], digest: str, epochs: Sequence[int]) -> str | None:
    """Return the name of a training that has all that is wanted, or is on the way to it."""
    begun = None
    for folder in folders:
        if is_trained(folder, epochs):
            return folder.name
        if folder.name.endswith(f"-{_make_key(digest, epochs)}"):
            begun = folder.name
    return begun


def _make_key(digest: str, epochs: Sequence[int]) -> str:
    """More epochs to keep are another training: those that one did not keep are lost."""
    return "-".join([digest, *([hashlib.sha256(json.dumps(epochs).encode()).hexdigest()[:4]] if epochs else [])])


def _make_name(owner: Point, digest: str, epochs: Sequence[int]) -> str:
    parts = owner.name.split(SEPARATOR)
    label = owner.name if owner.is_run else SEPARATOR.join(p for p in parts if not p.startswith(f"{MODE_KEY}="))
    return f"{label or 'training'}-{_make_key(digest, epochs)}"
