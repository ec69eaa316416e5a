"""Saved states of a training, from which it resumes bit for bit. The newest two are kept.

A file's name has its step and its digest, which detects truncated files. Each file contains the training's key (recipe,
base model and versions), so that states of other trainings are not used.
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
    """The states in a folder of the training that `key` identifies."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self._folder = folder
        self._key = dict(key)

    def load(self) -> dict[str, Any] | None:
        """Return the newest intact state of this training, or `None`. Newer files, which are unusable, are removed."""
        for file in self._find():
            content = self._read(file)
            if not isinstance(content, str):
                return content
            print(f"{file}: {content}; it is not used", flush=True)
            file.unlink()
        return None

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Save the state after a step. The previous state is kept, in case the new file is damaged."""
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
        """Return a state's content, or as text why it is unusable."""
        if _digest(file) != file.stem.rpartition("-")[2]:
            return "is damaged"
        try:
            # All of it: an optimizer's state has classes of its own, which torch would refuse until they are imported.
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
        except (pickle.UnpicklingError, RuntimeError, ImportError, AttributeError) as error:
            return f"cannot be read ({str(error).splitlines()[0]})"
        if content["key"] != self._key:
            return "belongs to another recipe, base model or version"
        return content


def get_random_state() -> dict[str, Any]:
    """Return the state of every random number generator that a training draws from."""
    name, keys, *position = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *position],
        "torch": torch.get_rng_state(),
        # A process of a training uses one GPU, or none on the CPU, however many GPUs the machine has.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set every random number generator to a state that `get_random_state` returned."""
    random.setstate(state["python"])
    name, keys, *position = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *position))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
