"""Copy the adapter of a training to a point."""

import os
import shutil
from pathlib import Path

from lorasweep.layout import ADAPTER_WEIGHTS, RECORD
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record


def take_adapter(source: Path, recipe: Path, state: Path, point: Path, choice: str | None = None) -> None:
    """Copy the adapter in `source` and its recipe to a point, and remove `state`, the training's temporary files.

    The first point gets a hard link to the weights, every further point a copy. So a sweep with one mode stores each
    adapter once, and no two points share a file: changing one point's file, or only its time stamp, affects no other.

    `choice` is the digest of the evaluations by which the run had planned to choose the epoch, if it does so.

    Raises:
        InputError: there are no weights in `source`, or not those in its record; or the epoch was chosen otherwise.
    """
    weights = source / ADAPTER_WEIGHTS
    again = f"remove {recipe.parent} and run again to train it again"
    if not weights.is_file():
        raise InputError(f"{weights}: is missing; {again}")
    record = find_record(source / RECORD)
    if digest_file(weights) != record.get("adapter_sha256"):
        raise InputError(f"{weights}: is not what {source / RECORD} says; {again}")
    if choice and record.get("best_epoch", {}).get("evaluation_sha256") != choice:
        raise InputError(
            f"{source}: its epoch was not chosen as this run had planned, since a file of evaluation.validation_task "
            "has changed meanwhile; run the same command again"
        )
    adapter = point / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(source, adapter, ignore=lambda _, names: {ADAPTER_WEIGHTS} & set(names))
    if not _link(weights, adapter / ADAPTER_WEIGHTS):
        shutil.copyfile(weights, adapter / ADAPTER_WEIGHTS)
    shutil.copyfile(recipe, point / "recipe.yaml")
    shutil.rmtree(state, ignore_errors=True)


def _link(source: Path, target: Path) -> bool:
    """Make a hard link and return `True`, unless the file system has none or the file already has another link."""
    try:
        os.link(source, target)
    except OSError:
        return False
    # If two processes link the file at once, both links may be removed.
    if target.stat().st_nlink > 2:
        target.unlink()
        return False
    return True
