"""Share trainings: points that differ only in mode or in epoch have one training.

A training has an identity, the digest of what determines its result: its recipe without paths, its base model, and the
choice of its epoch if a task makes it. The name of its folder, `trainings/<name>/` in the experiment's folder, contains
the identity's first digits, so the folder never holds the results of another training.
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
from lorasweep.layout import ADAPTER_WEIGHTS, RECORD, RUNGS, STATE, TRAININGS, get_epoch_folder
from lorasweep.util.digest import digest_file

_DIGITS = 10
"""Hexadecimal digits of the digest in a name: two of 10,000 trainings collide with a probability of 1 in 20,000."""

_NAME = re.compile(rf"(?P<label>.+)-(?P<key>[0-9a-f]{{{_DIGITS}}}(?:-[0-9a-f]{{4}})?)")


def share_trainings(points: Mapping[str, Point], identify: Callable[[Point], str], results: Path) -> dict[str, Point]:
    """Return the points, each with the name of its training and the point that owns the training.

    `identify` returns the identity of a point's training, a sha256. `results` is the experiment's folder: an existing
    training there is reused if it kept all the requested epochs.
    """
    groups: dict[str, list[Point]] = {}
    for point in points.values():
        if not point.adapter:
            groups.setdefault(identify(point)[:_DIGITS], []).append(point)
    folders = _list_folders(results / TRAININGS)
    shared = dict(points)
    for digest, members in groups.items():
        # The result must not depend on the order of points in the file.
        members.sort(key=lambda point: point.name)
        owner = next(point for point in members if point.epoch is None)
        epochs = sorted({point.epoch for point in members if point.epoch is not None})
        name = _find_name(folders.get(digest, ()), digest, epochs) or _make_name(owner, digest, epochs)
        for point in members:
            shared[point.name] = replace(point, training=name, trained_by=None if point is owner else owner.name)
    return shared


def is_trained(folder: Path, epochs: Iterable[int] = ()) -> bool:
    """Whether a training's folder holds the adapter of its last epoch and those of `epochs`."""
    adapters = [folder / "adapter", *(folder / get_epoch_folder(epoch) for epoch in epochs)]
    return all((adapter / name).is_file() for adapter in adapters for name in (ADAPTER_WEIGHTS, RECORD))


def drop_unused(trainings: Path, current: Collection[str]) -> None:
    """Clean up trainings that are no longer in the experiment: remove their states, and adapters that no point uses.

    `trainings` is the folder of all trainings; `current` are the names of those in the experiment.
    """
    folders = list(trainings.iterdir()) if trainings.is_dir() else []
    folders = [folder for folder in folders if folder.name not in current and _NAME.fullmatch(folder.name)]
    taken = {digest_file(recipe) for recipe in trainings.parent.glob("*/recipe.yaml")} if folders else set()
    for folder in folders:
        recipe = folder / "recipe.yaml"
        for temporary in (STATE, RUNGS):
            shutil.rmtree(folder / temporary, ignore_errors=True)
        if not recipe.is_file() or digest_file(recipe) not in taken:
            shutil.rmtree(folder, ignore_errors=True)


def _list_folders(trainings: Path) -> dict[str, list[Path]]:
    """Return the folders of trainings by their recipe's digest."""
    folders: dict[str, list[Path]] = {}
    for folder in sorted(trainings.glob("*")) if trainings.is_dir() else ():
        if match := _NAME.fullmatch(folder.name):
            folders.setdefault(match["key"][:_DIGITS], []).append(folder)
    return folders


def _find_name(folders: Iterable[Path], digest: str, epochs: Sequence[int]) -> str | None:
    """Return the name of a training that has all requested epochs, else of an unfinished one that will have them."""
    begun = None
    for folder in folders:
        if is_trained(folder, epochs):
            return folder.name
        if folder.name.endswith(f"-{_make_key(digest, epochs)}"):
            begun = folder.name
    return begun


def _make_key(digest: str, epochs: Sequence[int]) -> str:
    """Return the key in a training's name. It depends on `epochs`: a training cannot restore epochs it did not keep."""
    return "-".join([digest, *([hashlib.sha256(json.dumps(epochs).encode()).hexdigest()[:4]] if epochs else [])])


def _make_name(owner: Point, digest: str, epochs: Sequence[int]) -> str:
    parts = owner.name.split(SEPARATOR)
    label = owner.name if owner.is_run else SEPARATOR.join(p for p in parts if not p.startswith(f"{MODE_KEY}="))
    return f"{label or 'training'}-{_make_key(digest, epochs)}"
