"""Publish the adapter of an epoch as a complete directory that PEFT and transformers can load."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.layout import ADAPTER_WEIGHTS, RECORD, TRAINING_LOG
from lorasweep.trainers import Diverged, TrainingError
from lorasweep.trainers.training_log import Row, cut_log, read_log
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_record
from lorasweep.util.versions import get_git_revision, get_versions

_ZERO_AT_FIRST = ("lora_B", "lora_embedding_A")
"""Parts of the names of the matrices that begin as zeros: B, and of an embedding A."""


def check_weights(weights: Path) -> None:
    """Check that an adapter's values are finite and that its update is not zero.

    Raises:
        Diverged: a value is not finite.
        TrainingError: the update is zero.
        OSError, safetensors.SafetensorError: the file cannot be read.
    """
    import torch
    from safetensors.torch import load_file

    tensors = load_file(weights)
    broken = sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all())
    if broken:
        raise Diverged(f"the training diverged: values in '{broken[0]}' are not finite; a smaller lr may help")
    if not any(tensor.any() for name, tensor in tensors.items() if any(side in name for side in _ZERO_AT_FIRST)):
        raise TrainingError("the training had no effect: every update is zero")


def complete(
    adapter: Path,
    base: Checkpoint,
    recipe: Path,
    log: Path,
    epoch: int,
    packages: Collection[str],
    facts: Mapping[str, Any],
    is_best: bool = False,
) -> None:
    """Add the tokenizer, the log and, last, the record to a directory with an adapter's weights and configuration.

    `log` is truncated after `epoch`, unless that is the best of all its epochs (`is_best`). `packages` are those that a
    training's results depend on; their versions are recorded. `facts` are the values of the record that only the
    trainer knows: its name as `trainer`, `dtype`, `data_sha256`, `peak_memory_bytes`.
    """
    base.copy_tokenizer(adapter)
    last = read_log(log)[-1].epoch if is_best else epoch
    rows = cut_log(log, last, adapter / TRAINING_LOG)
    metrics = _get_metrics([row for row in rows if row.epoch <= epoch])
    best = {"epoch": epoch, "validation_loss": metrics["final_validation_loss"], "epochs_trained": last}
    record = {
        "base_model": str(base.path),
        "base_model_fingerprint": base.fingerprint,
        **base.template_record,
        "adapter_sha256": digest_file(adapter / ADAPTER_WEIGHTS),
        "recipe_sha256": digest_file(recipe),
        "versions": get_versions(*packages),
        "git_revision": get_git_revision(),
        **metrics,
        **({"best_epoch": best} if is_best else {}),
        **facts,
    }
    write_record(adapter / RECORD, record)


def publish(made: Path, adapter: Path) -> None:
    """Copy the complete directory `made` to `adapter`, replacing what was there."""
    aside = adapter.with_name(f".{adapter.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(made, aside)
    shutil.rmtree(adapter, ignore_errors=True)
    aside.rename(adapter)


def _get_metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the totals in the last row of a training's log, and the last validation loss or `None`."""
    last = rows[-1]
    losses = [row.validation_loss for row in rows if row.validation_loss is not None]
    return {
        "steps": last.step,
        "epochs": last.epoch,
        "tokens": last.tokens,
        "final_train_loss": last.loss,
        "final_validation_loss": losses[-1] if losses else None,
    }
