"""The log of a training: a row an optimizer step, on disk as soon as it is known.

While a training runs it lies in the point's `state/train/`, afterwards beside the adapter.
"""

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lorasweep.util.files import write_aside


@dataclass(frozen=True)
class Row:
    """What one optimizer step left."""

    step: int
    """Counted from 1, over all epochs."""
    epoch: int
    """Counted from 1."""
    loss: float
    """Mean over the tokens that are learnt, of the step's samples, before its update."""
    lr: float
    """The learning rate that the step was made with."""
    tokens: int
    """That went through the model so far, padding left out."""
    seconds: float
    """Of the training so far; what was lost when it was interrupted does not count."""
    validation_loss: float | None = None
    """Mean over the answers' tokens of the validation data, after the last step of an epoch."""

    def get_metrics(self) -> dict[str, float]:
        """Return what a metric logger is to be told at this step."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if name != "step" and value is not None}


COLUMNS = tuple(field.name for field in fields(Row))


class TrainingLog:
    """A log that is written row by row, after the `text` of one that was interrupted."""

    def __init__(self, file: Path, text: str = "") -> None:
        self._path = file
        write_aside(file, text or ",".join(COLUMNS) + "\n")
        self.rows = read_log(file)
        self._file = file.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._path.read_text(encoding="utf-8")

    def add(self, row: Row) -> Row:
        """Write a row through to the disk, and return it as a reader finds it."""
        self._writer.writerow(_format(row))
        self._file.flush()
        self.rows.append(_parse(dict(zip(COLUMNS, _format(row), strict=True))))
        return self.rows[-1]

    def close(self) -> None:
        self._file.close()


def read_log(file: Path) -> list[Row]:
    """Return the rows of a log; of one that is being written, the whole ones."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [_parse(row) for row in csv.DictReader(whole.splitlines())]


def cut_log(file: Path, epoch: int, to: Path) -> list[Row]:
    """Write a log up to the end of an epoch to another file, and return its rows."""
    rows = [row for row in read_log(file) if row.epoch <= epoch]
    head, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    to.write_text(head + "".join(lines[: len(rows)]), encoding="utf-8")
    return rows


def _format(row: Row) -> list[str]:
    step, epoch, loss, lr, tokens, seconds, validation_loss = astuple(row)
    said = "" if validation_loss is None else f"{validation_loss:.6g}"
    return [str(step), str(epoch), f"{loss:.6g}", f"{lr:.6g}", str(tokens), f"{seconds:.3f}", said]


def _parse(row: dict[str, str]) -> Row:
    return Row(
        step=int(row["step"]),
        epoch=int(row["epoch"]),
        loss=float(row["loss"]),
        lr=float(row["lr"]),
        tokens=int(row["tokens"]),
        seconds=float(row["seconds"]),
        validation_loss=float(row["validation_loss"]) if row["validation_loss"] else None,
    )
