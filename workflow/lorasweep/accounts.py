"""Keeps a run's accounts while it goes on: attempts of jobs, samples of the disk, the ledger."""

import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from lorasweep.forecast import Forecast
from lorasweep.job_records import JOB_RECORDS, append_records
from lorasweep.job_watcher import JobWatcher, measure_temporary
from lorasweep.ledger import RunRecord
from lorasweep.slurm import read_elapsed

SAMPLE_SECONDS = 5.0
"""Between two looks at the disk, at least."""

LOOKING_SHARE = 0.05
"""Most of the time that is spent looking: on a slow file system the looks are fewer."""

UPDATE_SECONDS = 60.0
"""Between two updates of the ledger, at least."""


class Accounts:
    """The accounts of one run; `start` and `stop` are called once."""

    def __init__(self, forecast: Forecast, watcher: JobWatcher) -> None:
        self._forecast = forecast
        self._watcher = watcher
        self._began = datetime.now(UTC).isoformat(timespec="seconds")
        self._started = time.monotonic()
        self._written = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.peak_temporary_bytes = 0

    def start(self) -> None:
        """Begin to look at the disk."""
        self._thread.start()

    def stop(self) -> str:
        """Write all down; return the ledger in short, or why it could not be written."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        self._watcher.end_all()
        return self._update()

    def _run(self) -> None:
        updated = time.monotonic()
        wait = 0.0
        while not self._ended.wait(wait):
            began = time.monotonic()
            size = measure_temporary(self._forecast.results, self._forecast.unfinished)
            self.peak_temporary_bytes = max(self.peak_temporary_bytes, size)
            wait = max(SAMPLE_SECONDS, (time.monotonic() - began) / LOOKING_SHARE)
            if time.monotonic() - updated > UPDATE_SECONDS:
                self._update()
                updated = time.monotonic()

    def _update(self) -> str:
        try:
            return self._write()
        except OSError as error:  # a full disk must not hide how the run went
            return f"The ledger could not be written: {error}"

    def _write(self) -> str:
        forecast = self._forecast
        attempts = self._watcher.attempts[self._written :]
        seconds = read_elapsed(attempt.slurm_job for attempt in attempts if attempt.slurm_job)
        append_records(forecast.make_records(self._began, attempts, seconds), Path(forecast.results, JOB_RECORDS))
        self._written += len(attempts)
        return forecast.settle(
            RunRecord(
                began=self._began,
                wall_seconds=round(time.monotonic() - self._started, 3),
                peak_temporary_bytes=self.peak_temporary_bytes,
                planned_wall_seconds=round(forecast.rest.wall_seconds, 3),
                planned_temporary_bytes=forecast.rest.temporary_bytes,
            )
        )
