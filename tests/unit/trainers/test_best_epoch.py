"""The best epoch of a training, and the end of its patience."""

import pytest

from lorasweep.trainers.best_epoch import find_best_epoch, is_out_of_patience
from lorasweep.trainers.training_log import Row


def make(*losses: float) -> list[Row]:
    """Rows of two steps an epoch; a validation loss is in the last one of each epoch."""
    steps = [
        (2 * epoch + step + 1, epoch + 1, loss if step else None)
        for epoch, loss in enumerate(losses)
        for step in (0, 1)
    ]
    return [
        Row(step, epoch, loss=9.0, lr=0.1, tokens=step, seconds=step, validation_loss=loss)
        for step, epoch, loss in steps
    ]


@pytest.mark.parametrize(
    ("losses", "epoch"), [((1.0,), 1), ((3, 2, 1), 3), ((1, 2, 3), 1), ((3, 1, 2), 2), ((2, 1, 1), 2), ((1, 2, 1), 1)]
)
def test_the_best_epoch_has_the_lowest_loss_and_is_the_first_of_equals(losses: tuple[float, ...], epoch: int) -> None:
    assert find_best_epoch(make(*losses)) == epoch


@pytest.mark.parametrize(
    ("losses", "patience", "is_out"),
    [
        ((1, 2, 3, 4), None, False),
        ((1,), 1, False),
        ((1, 2), 1, True),
        ((1, 1), 1, True),
        ((1, 2), 2, False),
        ((1, 2, 1.5), 2, True),
        ((2, 3, 1, 2), 2, False),
        ((2, 3, 1, 2, 3), 2, True),
        ((), 1, False),
    ],
)
def test_patience_counts_the_epochs_without_a_lower_loss(
    losses: tuple[float, ...], patience: int | None, is_out: bool
) -> None:
    rows = make(*losses)
    assert is_out_of_patience(rows, patience) is is_out
    assert is_out_of_patience([*rows, Row(99, len(losses) + 1, 9.0, 0.1, 99, 99.0)], patience) is is_out
