"""The frame of every training by a trainer of lorasweep: what is done before, around and after its steps.

A trainer's own part makes the steps. It leaves the adapter of each epoch in `epoch_<number from 0>` of the training's
state, as PEFT saves adapters, and its log beside them.
"""

import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD, TRAINING_LOG
from lorasweep.trainers import Diverged, TrainingError
from lorasweep.trainers.best_epoch import find_best_epoch
from lorasweep.trainers.out_of_memory import MEMORY_NOTE, OUT_OF_MEMORY, mark_attempt, plan_halving, read_halvings
from lorasweep.trainers.publication import check_weights, complete, publish
from lorasweep.trainers.rungs import DIVERGENCE_NOTE, explain_divergence
from lorasweep.trainers.training_log import read_log
from lorasweep.util.digest import digest_file, digest_files
from lorasweep.util.errors import InputError, describe
from lorasweep.util.files import explain_write_failure, hold_alone, write_aside, write_record
from lorasweep.util.versions import get_versions

if TYPE_CHECKING:
    from lorasweep.trainers.saved_states import SavedStates

CACHES = ("HF_DATASETS_CACHE", "HF_MODULES_CACHE")
"""Environment variables of the caches of `datasets`, which are in the home directory by default."""


@dataclass(frozen=True)
class Frame:
    """A training, as far as its frame needs to know it."""

    trainer: str
    recipe: Path
    state: Path
    """Folder of the training's own files, `state/train` in the training's folder."""
    base: Path
    """The base model's folder."""
    chat_template: str | None
    """The text of a chat template that replaces the base model's own; `None`: none does."""
    data_files: tuple[str, ...]
    """The files of training samples."""
    validation_files: tuple[str, ...]
    """The files of validation samples, if there are any."""
    epochs: int
    batch_size: int
    """Samples per forward pass, before any halving."""
    device: str
    dtype: str
    packages: tuple[str, ...]
    """The packages that the result depends on."""
    keeps_best_epoch: bool = False
    """Whether the adapter of the epoch with the lowest validation loss is published instead of the last one's."""

    @property
    def log(self) -> Path:
        return self.state / TRAINING_LOG

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the training: only states and divergences with the same key apply to it.

        The folder of the training may have moved since.
        """
        text = self.recipe.read_text(encoding="utf-8").replace(str(self.state.parents[1]), "")
        return {
            "recipe_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "base_model_fingerprint": read_checkpoint(self.base).fingerprint,
            "versions": get_versions(*self.packages),
        }


@dataclass(frozen=True)
class Start:
    """From where an attempt at a training starts."""

    saved: "SavedStates"
    state: dict[str, Any] | None
    """The saved state to resume from; `None` starts from the beginning."""
    halvings: int
    """How many times the recipe's batch size is to be halved, and its accumulation doubled."""
    until: int | None = None
    """The epoch after which the training pauses, with its state saved; `None`: none."""


def train_in_frame(
    frame: Frame,
    adapter: Path,
    earlier: Mapping[int, Path] | None,
    run: Callable[[Start], int | None],
    get_facts: Callable[[], Mapping[str, Any]],
    until: int | None = None,
) -> None:
    """Train by `run`, and publish the adapters of the last or best epoch and of `earlier` ones, each in its directory.

    `adapter` appears complete or not at all: the weights as safetensors, PEFT's configuration, the base model's
    tokenizer, the log of the training, and a record of its inputs. It has no `config.json`, which would make
    transformers load it as a full model.

    Trained adapters are also kept in the point's state until the point is cleaned up. So a training that outlives its
    run is not repeated by the next run. An interrupted training resumes from its last saved state. States of another
    recipe, base model or version are dropped.

    `run` makes the steps, and returns the device's peak memory in bytes. `get_facts` returns what the record says
    besides. With `until`, the training pauses after that epoch, whose adapter is published alone; its state stays.

    Raises:
        Diverged: a loss or a value of the update is not finite, now or in an earlier attempt at the same training.
        Stopped: the training was told to stop. Its state is saved.
        TrainingError: the training failed, the update is zero, or the recipe has no such epoch.
    """
    if frame.keeps_best_epoch and earlier:
        raise TrainingError(f"{frame.recipe}: keeps its best epoch alone, but epoch {min(earlier)} is wanted too")
    if until is not None:
        _train_until(frame, adapter, until, run, get_facts)
        return
    targets = {**(earlier or {}), frame.epochs: adapter}
    if max(targets) > frame.epochs:
        raise TrainingError(
            f"{frame.recipe}: has {frame.epochs} epochs, but the adapter of epoch {max(targets)} is wanted"
        )
    trained = frame.state.with_name("trained")
    with hold_alone(frame.state.with_name("train.lock"), f"training {adapter.parent.name}"):
        if all(_is_trained(trained / str(epoch), frame.recipe) for epoch in targets):
            print(f"This recipe was trained by an earlier run, which ended before the training: using {trained}.")
        else:
            shutil.rmtree(trained, ignore_errors=True)
            digests = _check_digests(frame)
            with _note_divergence(frame), mark_attempt(frame):
                facts = _run(frame, run) | digests
                _collect(frame, frame.state / "trained", targets, {**get_facts(), **facts}).rename(trained)
            shutil.rmtree(frame.state)
            for note in (MEMORY_NOTE, DIVERGENCE_NOTE):
                frame.state.with_name(note).unlink(missing_ok=True)
        for epoch, target in targets.items():
            publish(trained / str(epoch), target)


def _train_until(
    frame: Frame,
    adapter: Path,
    until: int,
    run: Callable[[Start], int | None],
    get_facts: Callable[[], Mapping[str, Any]],
) -> None:
    """Train until the end of an epoch before the last, and publish its adapter. The training's state stays."""
    if not 0 < until < frame.epochs:
        raise TrainingError(f"{frame.recipe}: has {frame.epochs} epochs, so it cannot pause after epoch {until}")
    with hold_alone(frame.state.with_name("train.lock"), f"training {frame.recipe.parent.name}"):
        digests = _check_digests(frame)
        with _note_divergence(frame), mark_attempt(frame):
            facts = _run(frame, run, until) | digests
            made = frame.state / "part"
            shutil.rmtree(made, ignore_errors=True)
            _collect(frame, made, [until], {**get_facts(), **facts})
        frame.state.with_name(DIVERGENCE_NOTE).unlink(missing_ok=True)  # of other versions
        publish(made / str(until), adapter)
        shutil.rmtree(made)


@contextmanager
def _note_divergence(frame: Frame) -> Iterator[None]:
    """Record a divergence, and refuse to repeat it: the same recipe, model and versions would diverge again."""
    note = frame.state.with_name(DIVERGENCE_NOTE)
    earlier = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    if earlier.get("key") == frame.key:
        raise Diverged(explain_divergence(frame.state.parents[1]))
    try:
        yield
    except Diverged as error:
        write_aside(note, json.dumps({"key": frame.key, "message": str(error)}) + "\n")
        raise


def _is_trained(adapter: Path, recipe: Path) -> bool:
    record = adapter / RECORD
    if not record.is_file():
        return False
    content = json.loads(record.read_text(encoding="utf-8"))
    digests = (digest_file(recipe), digest_file(adapter / ADAPTER_WEIGHTS))
    return (content["recipe_sha256"], content["adapter_sha256"]) == digests


def _check_digests(frame: Frame) -> dict[str, Any]:
    """Check the data files, and return what the record says of them."""
    digests = {"data_sha256": _check_digest(frame, "training", frame.data_files)}
    if frame.validation_files:
        _check_digest(frame, "validation", frame.validation_files)
    return digests


def _check_digest(frame: Frame, kind: str, files: tuple[str, ...]) -> str:
    """Return the sha256 of the data of a kind, after comparing it with the one in the recipe, if there is one."""
    actual = digest_files(files)
    named = re.search(rf"(?m)^# {kind} data sha256: ([\w ]+)$", frame.recipe.read_text(encoding="utf-8"))
    if named and named[1] != actual:
        raise TrainingError(
            f"{', '.join(files)}: has changed since {frame.recipe} was written "
            f"(sha256 {named[1][:12]}, now {actual[:12]}); run again"
        )
    return actual


def _run(frame: Frame, run: Callable[[Start], int | None], until: int | None = None) -> dict[str, Any]:
    """Make the steps, and return the values of the record that are known by them."""
    if frame.device == "cpu":  # if torchtune sees a GPU, it packs samples for the GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # By default the caches of `datasets` are in the user's home directory, which on a cluster has a quota.
    cache = frame.state / "huggingface"
    os.environ |= {name: str(cache) for name in CACHES}
    from lorasweep.trainers.saved_states import SavedStates

    saved = SavedStates(frame.state / "saved", frame.key)
    state = saved.load()
    for leftover in (cache, frame.state / "trained") if state else (frame.state,):
        shutil.rmtree(leftover, ignore_errors=True)
    frame.state.mkdir(parents=True, exist_ok=True)
    halvings = read_halvings(frame)
    if state and until is not None:
        write_aside(frame.log, state["log"])
        if read_log(frame.log)[-1].epoch > until:  # of an attempt that was to pause later, or not at all
            return _describe_run(frame, state["peak_memory_bytes"], halvings)
    try:
        peak = run(Start(saved, state, halvings, until))
    except (TrainingError, InputError):
        raise
    except Exception as error:
        traceback.print_exc()
        if re.search(OUT_OF_MEMORY, str(error)):
            first = re.split(r"[.] |\n", str(error))[0].rpartition("Error: ")[2]
            raise TrainingError(f"{first}; {plan_halving(frame, halvings)}\n{describe(error)}") from error
        why = explain_write_failure(frame.state) or describe(error)
        raise TrainingError(f"{frame.trainer} failed; {why}") from error
    return _describe_run(frame, peak, halvings)


def _describe_run(frame: Frame, peak: int | None, halvings: int) -> dict[str, Any]:
    return {
        "trainer": frame.trainer,
        "dtype": frame.dtype,
        "peak_memory_bytes": peak,
        "batch_size_used": frame.batch_size // 2**halvings,
    }


def _collect(frame: Frame, folder: Path, epochs: Iterable[int], facts: Mapping[str, Any]) -> Path:
    """Make the directories to publish, `folder/EPOCH`, and return `folder`. The best epoch is in the last one's."""
    base, is_best = read_checkpoint(frame.base, frame.chat_template), frame.keeps_best_epoch
    folder.mkdir()
    for place in epochs:
        epoch = find_best_epoch(read_log(frame.log)) if is_best else place
        adapter, trained = folder / str(place), frame.state / f"epoch_{epoch - 1}"
        _check_weights(trained / ADAPTER_WEIGHTS)
        adapter.mkdir()
        # torchtune's files have mode 0600. Copies follow the umask.
        shutil.copyfile(trained / ADAPTER_WEIGHTS, adapter / ADAPTER_WEIGHTS)
        peft_config = json.loads((trained / ADAPTER_CONFIG).read_text(encoding="utf-8")) | {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base.path.resolve()),
        }
        write_record(adapter / ADAPTER_CONFIG, peft_config)
        complete(adapter, base, frame.recipe, frame.log, epoch, frame.packages, facts, is_best)
    return folder


def _check_weights(weights: Path) -> None:
    from safetensors import SafetensorError

    try:
        check_weights(weights)
    except (OSError, SafetensorError) as error:
        # An earlier attempt wrote this file before it was interrupted. None of its files can be trusted.
        shutil.rmtree(weights.parents[1])
        raise TrainingError(f"{weights}: cannot be read ({error}); the next attempt trains from the start") from error


def check_finite(loss: float, what: str, step: int) -> float:
    """Return a loss of a step, if it is finite.

    Raises:
        Diverged: it is not.
    """
    if not isfinite(loss):
        raise Diverged(f"the training diverged: the {what} of step {step} is {loss}; a smaller lr may help")
    return loss


def prepare_folders(names: Collection[str], training: Path, aside: Path) -> dict[str, Path]:
    """Return the folders of the metric loggers with the given names, but `disk`; set what they read of the environment.

    For a training in `EXPERIMENT/trainings/TRAINING` they are `EXPERIMENT/NAME/TRAINING`. Their old content is removed.
    W&B and MLflow are offline unless their environment variables say otherwise. W&B's caches are in `aside`, not in the
    home directory.
    """
    experiment = training.parents[1]
    folders = {name: experiment / name / training.name for name in ("tensorboard", "wandb", "mlflow")}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
    if "wandb" in names:
        folder = folders["wandb"].resolve()
        folder.mkdir(parents=True)
        for name, value in _get_wandb_defaults(folder, aside.resolve() / "wandb").items():
            os.environ.setdefault(name, value)
    if "mlflow" in names:
        for name, value in _get_mlflow_defaults(folders["mlflow"].resolve()).items():
            os.environ.setdefault(name, value)
    return {name: folder for name, folder in folders.items() if name in names}


def _get_mlflow_defaults(folder: Path) -> dict[str, str]:
    return {
        "MLFLOW_TRACKING_URI": folder.as_uri(),
        # A database would need SQLAlchemy, and locks of the file system.
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRUNCATE_LONG_VALUES": "true",
    }


def _get_wandb_defaults(folder: Path, aside: Path) -> dict[str, str]:
    return {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        **{f"WANDB_{kind}_DIR": str(aside) for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
    }
