"""The log of a training: one row per optimizer step, written to disk at once.

During the training, the log is in the point's `state/train/`. Afterwards it is in the adapter's directory.
"""

import csv
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from lorasweep.util.files import write_aside


@dataclass(frozen=True)
class Row:
    """Metrics of one optimizer step."""

    step: int
    """Number of the step, counted from 1 over all epochs."""
    epoch: int
    """Number of the epoch, counted from 1."""
    loss: float
    """Mean loss per learnt token of the step's samples, before the update."""
    lr: float
    """Learning rate of the step."""
    tokens: int
    """Number of tokens trained on so far, padding excluded."""
    seconds: float
    """Duration of the training so far. Work lost to an interruption is not counted."""
    validation_loss: float | None = None
    """Mean loss per learnt token on the validation data; set at the last step of an epoch."""

    def get_metrics(self) -> dict[str, float]:
        """Return the metrics to log at this step, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if name != "step" and value is not None}


COLUMNS = tuple(field.name for field in fields(Row))


class TrainingLog:
    """A log that is written row by row. `text` is the log of the interrupted attempt, if there was one."""

    def __init__(self, file: Path, text: str = "") -> None:
        self._path = file
        write_aside(file, text or ",".join(COLUMNS) + "\n")
        self.rows = read_log(file)
        self._file = file.open("a", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")

    @property
    def text(self) -> str:
        """The whole log so far."""
        return self._path.read_text(encoding="utf-8")

    def add(self, row: Row) -> Row:
        """Append a row, flush it, and return it with its values rounded as in the file."""
        self._writer.writerow(_format(row))
        self._file.flush()
        self.rows.append(_parse(dict(zip(COLUMNS, _format(row), strict=True))))
        return self.rows[-1]

    def close(self) -> None:
        self._file.close()


def read_log(file: Path) -> list[Row]:
    """Return the complete rows of a log, which may still be being written."""
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    return [_parse(row) for row in csv.DictReader(complete.splitlines())]


def cut_log(file: Path, epoch: int, to: Path) -> list[Row]:
    """Copy the rows of a log up to the end of an epoch to the file `to`, and return them."""
    rows = [row for row in read_log(file) if row.epoch <= epoch]
    head, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    to.write_text(head + "".join(lines[: len(rows)]), encoding="utf-8")
    return rows


def _format(row: Row) -> list[str]:
    step, epoch, loss, lr, tokens, seconds, validation_loss = astuple(row)
    validation = "" if validation_loss is None else f"{validation_loss:.6g}"
    return [str(step), str(epoch), f"{loss:.6g}", f"{lr:.6g}", str(tokens), f"{seconds:.3f}", validation]


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
