"""Trainers: what stands between a point's settings and its adapter.

A trainer is a module with the functions of `Trainer`. The workflow knows no more of it than these.
"""

from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from lorasweep.checkpoint import Checkpoint
from lorasweep.experiment import Controls, Data, Model

SAVE_MINUTES = 10
"""Between one saved state of a training and the next, unless the experiment says otherwise."""


@dataclass(frozen=True)
class TrainingSpec:
    """Everything that a training depends on."""

    checkpoint: Checkpoint
    controls: Controls
    swept: tuple[str, ...]
    """The keys of `controls` that vary between points."""
    model: Model
    data: Data
    output_dir: str
    """The point's folder."""


class Trainer(Protocol):
    """What a trainer offers. `recipe` runs where Snakemake runs, without torch; `train` in the training environment."""

    def recipe(self, spec: TrainingSpec) -> str:
        """Return the complete recipe of a training as text; the same text for the same spec.

        Raises:
            InputError: this model, or these settings, cannot be trained.
        """

    def declared_adapter_only(self, override: dict[str, Any]) -> bool | None:
        """Return whether an override says that adapters alone, or full models, are saved; `None` if it does not."""

    def measure_lengths(self, recipe: Path, most: int) -> list[int]:
        """Return how many tokens samples have, of so many at most, evenly taken; none is cut or packed."""

    def train(
        self, recipe: Path, adapter: Path, metric_loggers: Collection[str] = (), save_minutes: float = SAVE_MINUTES
    ) -> None:
        """Run a recipe, and publish its last adapter as a directory that PEFT and transformers load.

        While it runs, its log is `state/train/training_log.csv` in the point's folder; `metric_loggers` are told the
        same. At SIGTERM, and every so many minutes, what it needs to go on is saved in `state/train/`; the next call
        goes on from there.

        Raises:
            Stopped: it was told to stop.
            Diverged: it came to a loss or an adapter that is not finite.
            TrainingError: it failed in another way, or changed nothing.
        """


class TrainingError(RuntimeError):
    """A training that did not give an adapter."""


class Stopped(TrainingError):
    """A training that was told to stop, and has saved its state."""


class Diverged(TrainingError):
    """A training whose loss or adapter is not finite: it would come to the same again."""


def get_trainer(name: str = "torchtune") -> Trainer:
    """Return a trainer by name."""
    return cast(Trainer, import_module(f"lorasweep.trainers.{name}"))
