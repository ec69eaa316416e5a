"""Taking an adapter from the training that made it, as the adapter of a point."""

import os
import shutil
from pathlib import Path

from lorasweep.layout import ADAPTER_WEIGHTS
from lorasweep.util.errors import InputError


def take_adapter(source: Path, recipe: Path, state: Path, point: Path) -> None:
    """Give a point the adapter in `source`, and the recipe that it was trained by.

    The first point that takes an adapter has a hard link to its weights, and each other one a copy. So a sweep of one
    mode has each adapter on the disk once, and what happens to one point's files, be it a new time alone, happens to
    no other point's. `state`, what the training needed only while it ran, is removed.

    Raises:
        InputError: there are no weights in `source`.
    """
    weights = source / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise InputError(f"{weights}: is missing; remove {recipe.parent} and run again, and it is trained anew")
    adapter = point / "adapter"
    shutil.rmtree(adapter, ignore_errors=True)
    shutil.copytree(source, adapter, ignore=lambda _, names: {ADAPTER_WEIGHTS} & set(names))
    if not _link(weights, adapter / ADAPTER_WEIGHTS):
        shutil.copyfile(weights, adapter / ADAPTER_WEIGHTS)
    shutil.copyfile(recipe, point / "recipe.yaml")
    shutil.rmtree(state, ignore_errors=True)


def _link(source: Path, target: Path) -> bool:
    """Make a hard link if the file system has any, and the file has no other."""
    try:
        os.link(source, target)
    except OSError:
        return False
    # Of two that do so at once, neither stays.
    if target.stat().st_nlink > 2:
        target.unlink()
        return False
    return True
