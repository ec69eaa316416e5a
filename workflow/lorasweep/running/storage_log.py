"""The log of an experiment's disk usage over time: a CSV file of bounded size."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lorasweep.util.files import end_last_line, write_aside

CHANGE = 0.01
"""Relative change of kept or temporary bytes from which a sample is written at once."""

SECONDS = 60
"""Seconds after which a sample is written even without a change."""

MOST_ROWS = 10_000
"""Maximum number of rows, about half a megabyte. Of a longer log, every second row is dropped."""


@dataclass(frozen=True)
class StorageSample:
    """Disk usage of an experiment at one time."""

    time: str
    """Time in UTC, as ISO 8601 with whole seconds."""
    kept_bytes: int
    """Size of the kept files of finished points, from their manifests."""
    temporary_bytes: int
    """Size of the temporary files of unfinished points."""


class StorageLog:
    """Append samples to the log, leaving out those that change little. Peaks of temporary bytes are always kept."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows = len(read_storage(file))
        self._last: StorageSample | None = None
        self._passed_over: StorageSample | None = None

    def add(self, sample: StorageSample, is_last: bool = False) -> None:
        """Write a sample unless it is close to the last one written. The last sample of a run is always written.

        Raises:
            OSError: the file cannot be written.
        """
        if not is_last and self._last and not _differ(self._last, sample):
            if not self._passed_over or sample.temporary_bytes > self._passed_over.temporary_bytes:
                self._passed_over = sample
            return
        rows = [sample]
        before = max(sample.temporary_bytes, self._last.temporary_bytes if self._last else 0)
        if self._passed_over and self._passed_over.temporary_bytes > before:
            rows.insert(0, self._passed_over)
        self._append(rows)
        self._last, self._passed_over = sample, None

    def _append(self, samples: Sequence[StorageSample]) -> None:
        is_new = not self._file.is_file()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if is_new:
            self._file.write_text(_HEADER, encoding="utf-8")
        end_last_line(self._file)
        with self._file.open("a", encoding="utf-8") as stream:
            stream.writelines(map(_format, samples))
        self._rows += len(samples)
        if self._rows > MOST_ROWS:
            rows = _thin(read_storage(self._file))
            write_aside(self._file, _HEADER + "".join(map(_format, rows)))
            self._rows = len(rows)


def read_storage(file: Path) -> list[StorageSample]:
    """Return the recorded samples, oldest first. Lines truncated by a crash are skipped."""
    samples = []
    if file.is_file():
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.reader(stream):
                if len(row) == len(fields(StorageSample)) and row[1].isdecimal() and row[2].isdecimal():
                    samples.append(StorageSample(row[0], int(row[1]), int(row[2])))
    return samples


def take_sample(kept_bytes: int, temporary_bytes: int) -> StorageSample:
    """Return a sample with the current time."""
    return StorageSample(datetime.now(UTC).isoformat(timespec="seconds"), kept_bytes, temporary_bytes)


_HEADER = ",".join(field.name for field in fields(StorageSample)) + "\n"


def _format(sample: StorageSample) -> str:
    return ",".join(map(str, astuple(sample))) + "\n"


def _differ(last: StorageSample, sample: StorageSample) -> bool:
    passed = datetime.fromisoformat(sample.time) - datetime.fromisoformat(last.time)
    pairs = ((last.kept_bytes, sample.kept_bytes), (last.temporary_bytes, sample.temporary_bytes))
    return passed >= timedelta(seconds=SECONDS) or any(abs(now - then) > CHANGE * then for then, now in pairs)


def _thin(samples: Sequence[StorageSample]) -> list[StorageSample]:
    """Keep one sample of each two neighbours: that with more temporary bytes."""
    pairs = [samples[start : start + 2] for start in range(0, len(samples), 2)]
    return [max(pair, key=lambda sample: sample.temporary_bytes) for pair in pairs]
