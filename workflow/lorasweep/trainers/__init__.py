"""Trainers turn a point's settings into an adapter.

A trainer is a module with the members of `Trainer`. The workflow uses nothing else of it.
`tests/e2e/test_trainers.py` tests any trainer against this interface.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.util.errors import InputError, JobError, nearest

if TYPE_CHECKING:  # the packages that these need are not in every training environment
    from lorasweep.checkpoints.checkpoint import Checkpoint
    from lorasweep.experiment.sections import Controls, Data, Model

OWN_TRAINERS = (DEFAULT_TRAINER, "trl")
"""The trainers of lorasweep, modules of this package."""

_STAGES = ("train", "eval")
_PARTS = ("STAGE", "recipe", "declared_adapter_only", "measure_lengths", "train")

SAVE_MINUTES = 10
"""Default number of minutes between two saved states of a training."""


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
    keeps_best_epoch: bool = False
    """Whether the training keeps the epoch with the lowest validation loss instead of the last one, and may stop early
    (`controls.patience`)."""


class Trainer(Protocol):
    """Interface of a trainer.

    `recipe` and `declared_adapter_only` are called in Snakemake's environment, which has no torch. `measure_lengths`
    and `train` are called in the environment that `STAGE` names.

    A trainer may also have `find_faults(recipe: str) -> dict[str, str]`, called there too, before the first job of a
    run. It returns why parts of a recipe cannot be built, by the part's name.

    A trainer may also have `count_positions(checkpoint: Checkpoint, controls: Controls) -> int | None`, called in
    Snakemake's environment. It returns the most tokens of a sequence that the model takes; `None`: any number.

    A trainer that can keep the epoch with the lowest validation loss has `KEEPS_BEST_EPOCH = True`. If the spec's
    `keeps_best_epoch` is true, so must the recipe say, and `train` publishes that epoch's adapter in place of the last
    one's. `lorasweep.trainers.best_epoch` says which epoch that is, and when the training stops early.

    A trainer that can pause has `CAN_PAUSE = True`, and `train` takes `until`: an epoch before the last. It then trains
    until the end of that epoch, saves its state there, and publishes that epoch's adapter. The next call, with a later
    `until` or none, resumes from the state, or from the beginning if there is none, and gives bit for bit what it would
    have given without the pause, where an interrupted training does so. `prune` needs it.

    A trainer that can replace the base model's chat template has `TAKES_CHAT_TEMPLATE = True`. If the spec's checkpoint
    has a `given_template`, so must the recipe say, and prompts and the published tokenizer have that one.
    """

    STAGE: str
    """Environment of the training, as in `envs/`: `train` or `eval`."""

    def recipe(self, spec: TrainingSpec) -> str:
        """Return the complete recipe of a training as text. The same spec always gives the same text.

        Raises:
            InputError: this model, or these settings (several `gpus`, say), cannot be trained.
        """

    def declared_adapter_only(self, override: dict[str, Any]) -> bool | None:
        """Return whether an override asks for adapters only (`True`) or full models (`False`); `None` if neither."""

    def measure_lengths(self, recipe: Path) -> Mapping[str, Sequence[Sequence[int]]]:
        """Return the numbers of tokens in the parts of every sample, in order, without a limit or packing.

        The key `train` has the training samples, and `validation` the validation samples, if there are any. A sample's
        parts are alternately tokens that are not learnt and tokens that are: a prompt of 9 tokens with an answer of 3
        is `[9, 3]`, and text that is learnt as a whole `[0, 12]`.

        Raises:
            InputError, TrainingError: a sample cannot be tokenized; the message has its place.
        """

    def train(
        self,
        recipe: Path,
        adapter: Path,
        metric_loggers: Collection[str] = (),
        save_minutes: float = SAVE_MINUTES,
        earlier: Mapping[int, Path] | None = None,
    ) -> None:
        """Run a recipe and publish the adapter of its last epoch as a directory that PEFT and transformers can load.

        `earlier` maps further epochs, counted from 1, to the directories of their adapters.

        During the training, the log is `state/train/training_log.csv` in the point's folder. `metric_loggers` get the
        same values. At SIGTERM, and every `save_minutes`, the training's state is saved in `state/train/`. The next
        call resumes from it.

        `lorasweep.experiment.training_data.read_samples` reads the data, and should be its only reader. Samples of more
        than `max_seq_len` tokens are treated as `data.too_long` says.

        The plan and the status of a run assume that an epoch has `samples // batch_size // gradient_accumulation_steps`
        steps, or `max_steps_per_epoch` if that is less. The remaining samples make no step of their own: torchtune adds
        their whole batches to the next epoch's first step, and trl leaves them out. They also assume that packs are
        filled in order, each with as many whole samples as fit.

        Besides weights and configuration, the directory has the base model's tokenizer, the log, and `lorasweep.json`
        with at least `trainer` (its name), `base_model`, `base_model_fingerprint`, `recipe_sha256`, `adapter_sha256`,
        `data_sha256`, `dtype`, `versions`, `steps`, `epochs`, `tokens`, `final_train_loss`, `final_validation_loss` and
        `peak_memory_bytes`. The directory appears complete or not at all. `lorasweep.trainers.publication` writes all
        of this.

        Raises:
            Stopped: the training was told to stop.
            Diverged: a loss or a value of the adapter is not finite.
            TrainingError: the training failed otherwise, left the weights unchanged, or has no such epoch.
        """


class TrainingError(JobError):
    """A training ended without an adapter."""


class Stopped(TrainingError):
    """A training was told to stop. A later attempt resumes from its saved state."""


class Killed(TrainingError):
    """A process of a training was killed, for an unknown reason."""


class Diverged(TrainingError):
    """The loss or the adapter of a training is not finite. Training again would give the same."""


def get_trainer(name: str) -> Trainer:
    """Return a trainer by its name, `lorasweep.trainers.<name>`, or by the dotted path of its module.

    Raises:
        InputError: the module does not exist, cannot be imported here, or is not a trainer.
    """
    path = f"{__name__}.{name}" if name in OWN_TRAINERS else name
    expected = f"{', '.join(OWN_TRAINERS)}, or the dotted path of a module with the members of {__name__}.Trainer"
    try:
        module = import_module(path)
    except (ImportError, ValueError, TypeError) as error:  # ValueError and TypeError: not a module name
        if f"{name}.".startswith(f"{getattr(error, 'name', None)}."):
            raise InputError(
                f"{name!r} is not known{nearest(name, OWN_TRAINERS)}", f"{expected}, in a folder of PYTHONPATH"
            ) from error
        raise InputError(f"{name!r} cannot be imported where Snakemake runs: {error}", expected) from error
    if missing := [part for part in _PARTS if not hasattr(module, part)]:
        raise InputError(f"{name!r} is not a trainer: it has no {', '.join(missing)}", expected)
    if module.STAGE not in _STAGES:
        raise InputError(f"{name!r}: STAGE: {module.STAGE!r} is invalid", " or ".join(_STAGES))
    return cast(Trainer, module)
