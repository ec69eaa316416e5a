"""Storage over time: what is new is written, no peak is lost, and the file stays small."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lorasweep.running import storage_log
from lorasweep.running.storage_log import StorageLog, StorageSample, read_storage

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def make(seconds: int, kept: int, temporary: int) -> StorageSample:
    return StorageSample((BEGIN + timedelta(seconds=seconds)).isoformat(timespec="seconds"), kept, temporary)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "e/storage.csv"


def test_changes_are_written_at_once_and_sameness_once_a_minute(file: Path) -> None:
    log = StorageLog(file)
    samples = [make(5 * i, 1000, 5000 + i) for i in range(13)]
    changes = [make(65, 1000, 6000), make(70, 1020, 6000), make(75, 1020, 0)]
    for sample in [*samples, *changes]:
        log.add(sample)
    assert file.read_text().splitlines()[0] == "time,kept_bytes,temporary_bytes"
    assert read_storage(file) == [samples[0], samples[12], *changes]


def test_a_peak_between_two_rows_is_kept(file: Path) -> None:
    log = StorageLog(file)
    for sample in (make(0, 0, 1000), make(5, 0, 1009), make(10, 0, 1005), make(15, 0, 100)):
        log.add(sample)
    assert read_storage(file) == [make(0, 0, 1000), make(5, 0, 1009), make(15, 0, 100)]


def test_the_last_sample_of_a_run_is_written_and_the_next_run_appends(file: Path) -> None:
    first = StorageLog(file)
    first.add(make(0, 10, 0))
    first.add(make(1, 10, 0), is_last=True)
    with file.open("a") as stream:
        stream.write("2026-01-01T00:00")  # a line that a crash cut short
    StorageLog(file).add(make(9, 10, 0))
    assert read_storage(file) == [make(0, 10, 0), make(1, 10, 0), make(9, 10, 0)]


def test_a_long_run_writes_a_bounded_file_with_its_peak_in_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_log, "MOST_ROWS", 100)
    log = StorageLog(file)
    for i in range(1000):
        log.add(make(5 * i, i, 77_777 if i == 501 else 1000 + 500 * (i % 2)))
    rows = read_storage(file)
    assert 50 <= len(rows) <= 100
    assert max(row.temporary_bytes for row in rows) == 77_777
    assert [row.time for row in rows] == sorted(row.time for row in rows)
    assert rows[-1].kept_bytes >= 998
