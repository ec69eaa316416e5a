"""The rungs of a training: the epochs after which `prune` compares settings, and what it decided of this training.

A part of a training ends at each rung, and leaves a record, from which `prune` decides. The next part reads what it
decided.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from lorasweep.layout import (
    ADAPTER_WEIGHTS,
    RECORD,
    RUNGS,
    STATE,
    TRAINING_LOG,
    TRAININGS,
    get_part_file,
    get_rung_folder,
)
from lorasweep.trainers import Diverged
from lorasweep.trainers.publication import publish
from lorasweep.trainers.training_log import read_log
from lorasweep.util.digest import digest_file
from lorasweep.util.files import find_record, get_state, write_record

DIVERGENCE_NOTE = "train.diverged.json"
"""File in a training's `state/` that says how it diverged."""

_PRUNED = "pruned"


def find_stop(decisions: Iterable[Path], training: str) -> int | None:
    """Return the epoch after which a training stops by the decisions, in their order; `None`: it goes on.

    A decision that is missing, or says nothing of the training, stops nothing.
    """
    for file in decisions:
        stopped = _read_stopped(file, get_state(file)) if file.is_file() else {}
        if training in stopped:
            return stopped[training]
    return None


@lru_cache(maxsize=16)
def _read_stopped(file: Path, _: tuple[int, int, int]) -> dict[str, int]:
    """Return the epoch after which a decision stops trainings, by training. It is read again if the file's state is
    another: a run asks for each of many jobs."""
    decision = find_record(file)
    trainings = decision.get("trainings", {}).items()
    return {training: int(decision["after"]) for training, verdict in trainings if not verdict["stays"]}


def get_pruned_epoch(record: Mapping[str, Any]) -> int | None:
    """Return the epoch after which the training of an adapter with this record was stopped; `None`: it was not."""
    after: int | None = record.get(_PRUNED, {}).get("after")
    return after


def has_diverged(training: Path, part: Mapping[str, Any]) -> bool:
    """Whether a training diverged before the end of a part with this record, and is not to be trained again: the note
    in its folder is there."""
    return "diverged" in part and _get_note(training).is_file()


def explain_divergence(training: Path) -> str:
    """Return how a training diverged in an earlier attempt, and how to have it trained again."""
    note = _get_note(training)
    said = find_record(note).get("message", "the training diverged")
    return f"{said} (in an earlier attempt; to try again, remove {note})"


def _get_note(training: Path) -> Path:
    return training / STATE / DIVERGENCE_NOTE


def has_nothing_to_train(results: Path, training: str, after: int) -> bool:
    """Whether nothing is left to train of a training that stops after an epoch: it diverged, or its adapter is there.

    Its weights are not read: many jobs are asked for, each several times.
    """
    folder, part = results / TRAININGS / training, find_record(get_part_file(results, training, after))
    made = [find_record(each / RECORD).get("adapter_sha256") for each in _list_made(folder, part, after)]
    return has_diverged(folder, part) or part.get("adapter_sha256") in made


def describe_part(adapter: Path, after: int) -> dict[str, Any]:
    """Return what the record of a part says of the adapter that it has published."""
    record = json.loads((adapter / RECORD).read_text(encoding="utf-8"))
    last = read_log(adapter / TRAINING_LOG)[-1]
    return {
        "after": after,
        "validation_loss": last.validation_loss,
        "steps": last.step,
        "seconds": last.seconds,
        "adapter_sha256": record["adapter_sha256"],
        "adapter": record,
    }


def note_divergence(training: Path, after: int, error: Diverged) -> dict[str, Any]:
    """Return what the record of a part says if the training has diverged; note it, if the trainer has not."""
    if not _get_note(training).is_file():
        write_record(_get_note(training), {"message": str(error)})
    return {"after": after, "diverged": str(error)}


def publish_stopped(training: Path, part: Path, after: int, epochs: int) -> bool:
    """Publish the adapter after an epoch as that of a training that stops there, with a note in its record.

    `part` is the record of the part that ended there, and `epochs` the number of the training's epochs. Returns `False`
    if the adapter is not there.
    """
    ended, adapter = find_record(part), training / "adapter"
    folders = _list_made(training, ended, after)
    made = next((each for each in folders if digest_file(each / ADAPTER_WEIGHTS) == ended["adapter_sha256"]), None)
    if made is None:
        return False
    seconds = read_log(made / TRAINING_LOG)[-1].seconds
    record = ended["adapter"] | {_PRUNED: {"after": after, "epochs": epochs, "seconds": seconds}}
    if made == adapter:  # Snakemake has deleted the record alone
        write_record(adapter / RECORD, record)
        return True
    aside = training / RUNGS / ".stopped"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(made, aside)
    write_record(aside / RECORD, record)
    publish(aside, adapter)
    return True


def drop_rungs(training: Path) -> None:
    """Remove the adapters of a training's rungs."""
    shutil.rmtree(training / RUNGS, ignore_errors=True)


def _list_made(training: Path, part: Mapping[str, Any], after: int) -> list[Path]:
    """Return the folders that may have a training's adapter after an epoch, by the record of the part that ended there.

    None has, if it is of another recipe.
    """
    recipe = training / "recipe.yaml"
    if not recipe.is_file() or part.get("adapter", {}).get("recipe_sha256") != digest_file(recipe):
        return []
    folders = (get_rung_folder(training, after), training / "adapter")
    return [each for each in folders if all((each / name).is_file() for name in (ADAPTER_WEIGHTS, TRAINING_LOG))]
