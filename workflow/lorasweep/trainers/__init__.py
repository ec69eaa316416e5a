"""Trainers: what stands between a point's settings and its adapter.

A trainer is a module with what `Trainer` says. The workflow knows no more of it than that, and
`tests/e2e/test_trainers.py` tests it of any.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorasweep.util.errors import InputError, JobError, nearest

if TYPE_CHECKING:  # what reads the experiment file is not in every environment that can train
    from lorasweep.checkpoints.checkpoint import Checkpoint
    from lorasweep.experiment.sections import Controls, Data, Model

DEFAULT_TRAINER = "torchtune"

_STAGES = ("train", "eval")
_PARTS = ("STAGE", "recipe", "declared_adapter_only", "measure_lengths", "train")

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
    """What a trainer offers.

    Where Snakemake runs it is imported for `recipe` and `declared_adapter_only`, and there is no torch; the other two
    run in the environment that `STAGE` names.
    """

    STAGE: str
    """`train` or `eval`: the environment that it trains in, as in `envs/`."""

    def recipe(self, spec: TrainingSpec) -> str:
        """Return the complete recipe of a training as text; the same text for the same spec.

        Raises:
            InputError: this model, or these settings (several `gpus`, say), cannot be trained.
        """

    def declared_adapter_only(self, override: dict[str, Any]) -> bool | None:
        """Return whether an override says that adapters alone, or full models, are saved; `None` if it does not."""

    def measure_lengths(self, recipe: Path, most: int) -> list[int]:
        """Return how many tokens samples have, of so many at most, evenly taken; none is cut or packed."""

    def train(
        self,
        recipe: Path,
        adapter: Path,
        metric_loggers: Collection[str] = (),
        save_minutes: float = SAVE_MINUTES,
        earlier: Mapping[int, Path] | None = None,
    ) -> None:
        """Run a recipe, and publish its last adapter as a directory that PEFT and transformers load; and those of
        `earlier` epochs, by their number from 1, likewise.

        While it runs, its log is `state/train/training_log.csv` in the point's folder; `metric_loggers` are told the
        same. At SIGTERM, and every so many minutes, what it needs to go on is saved in `state/train/`; the next call
        goes on from there.

        The plan and the view of a run reckon that each epoch has `samples // batch_size // gradient_accumulation_steps`
        steps, or `max_steps_per_epoch` where that is less: what is left over makes no step.

        Beside weights and configuration the directory has the base model's tokenizer, the log, and `lorasweep.json`
        with at least `trainer` (its name), `base_model`, `base_model_fingerprint`, `recipe_sha256`, `adapter_sha256`,
        `data_sha256`, `dtype`, `versions`, `steps`, `epochs`, `tokens`, `final_train_loss`, `final_validation_loss` and
        `peak_memory_bytes`. It appears whole or not at all. `lorasweep.trainers.publication` does all that.

        Raises:
            Stopped: it was told to stop.
            Diverged: it came to a loss or an adapter that is not finite.
            TrainingError: it failed in another way, changed nothing, or has no such epoch.
        """


class TrainingError(JobError):
    """A training that did not give an adapter."""


class Stopped(TrainingError):
    """A training that was told to stop, and has saved its state."""


class Killed(TrainingError):
    """A training of which a process was killed, and cannot say why."""


class Diverged(TrainingError):
    """A training whose loss or adapter is not finite: it would come to the same again."""


def get_trainer(name: str) -> Trainer:
    """Return a trainer by its name, `lorasweep.trainers.<name>`, or by the path of its module.

    Raises:
        InputError: there is no such module, it cannot be imported here, or it is no trainer.
    """
    is_own = (Path(__file__).parent / name / "__init__.py").is_file()
    path = f"{__name__}.{name}" if is_own else name
    expected = f"{DEFAULT_TRAINER}, or the dotted path of a module with what {__name__}.Trainer says"
    try:
        module = import_module(path)
    except (ImportError, ValueError, TypeError) as error:  # the last two: no name of a module
        if f"{name}.".startswith(f"{getattr(error, 'name', None)}."):
            raise InputError(
                f"{name!r} is not known{nearest(name, [DEFAULT_TRAINER])}", f"{expected}, in a folder of PYTHONPATH"
            ) from error
        raise InputError(f"{name!r} cannot be imported where Snakemake runs: {error}", expected) from error
    if missing := [part for part in _PARTS if not hasattr(module, part)]:
        raise InputError(f"{name!r} is no trainer: it has no {', '.join(missing)}", expected)
    if module.STAGE not in _STAGES:
        raise InputError(f"{name!r}: STAGE: {module.STAGE!r} is invalid", " or ".join(_STAGES))
    return cast(Trainer, module)
