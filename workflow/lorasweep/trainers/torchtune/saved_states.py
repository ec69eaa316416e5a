"""States of a training from which it goes on as if nothing had happened: the newest two, each whole or not taken.

A file's name has its step and its digest, so that a torn one is known. It names the recipe and the base model inside:
of another training no state is used.
"""

import hashlib
import os
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch


class SavedStates:
    """The states in a folder, of the training that `key` names."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._key = dict(key)

    def load(self) -> dict[str, Any] | None:
        """Return the newest state that is whole and of this training, or nothing; all newer ones are removed."""
        for file in self._find():
            found = self._read(file)
            if not isinstance(found, str):
                return found
            print(f"{file}: {found}; it is not used", flush=True)
            file.unlink()
        return None

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Save what a step left; the state before stays, should this one not be whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for old in self._find()[1:]:
            old.unlink()
        aside = self._folder / ".saving"
        with aside.open("wb") as file:
            torch.save({"key": self._key, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self._folder / f"step-{step:09}-{_digest(aside)}.pt")

    def _find(self) -> list[Path]:
        return sorted(self._folder.glob("step-*.pt"), reverse=True)

    def _read(self, file: Path) -> dict[str, Any] | str:
        """Return a state's content, or what is wrong with it."""
        if _digest(file) != file.stem.rpartition("-")[2]:
            return "is torn"
        try:
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            return f"cannot be read ({str(error).splitlines()[0]})"
        if content["key"] != self._key:
            return "is of another recipe, base model or version"
        return content


def get_random_state() -> dict[str, Any]:
    """Return the state of every random number generator that a training draws from."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        # A training has one GPU, and none where it runs on the CPU, whatever the machine has.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set every random number generator to what `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
