"""The best epoch of a training, the one with the lowest validation loss, and the end of a training's patience.

Both follow from the losses in the training's log, as they are written there. So a training that was interrupted decides
as one that was not.
"""

from collections.abc import Iterable

from lorasweep.trainers.training_log import Row


def find_best_epoch(rows: Iterable[Row]) -> int:
    """Return the epoch with the lowest validation loss, the first of several."""
    losses = _get_losses(rows)
    return min(losses, key=losses.__getitem__)


def is_out_of_patience(rows: Iterable[Row], patience: int | None) -> bool:
    """Whether the last `patience` epochs had no lower validation loss than one before them; `None`: never."""
    rows = list(rows)
    losses = _get_losses(rows)
    return patience is not None and bool(losses) and max(losses) - find_best_epoch(rows) >= patience


def _get_losses(rows: Iterable[Row]) -> dict[int, float]:
    """Return the validation loss of each epoch, in order."""
    return {row.epoch: row.validation_loss for row in rows if row.validation_loss is not None}
