"""When a run looks at its SLURM jobs: often at the marks that jobs leave as they end, and now and then at SLURM.

A mark `COMPLETED` is the exit status 0 of the job's command, and so the job's success. A mark `FAILED` may be that of a
job that SLURM queues again, so it is no outcome: it is a reason to ask SLURM now. A job that leaves no mark, such as
that of a dead node, is seen when SLURM is asked.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Set
from pathlib import Path

from lorasweep.util.slurm_commands import FOLDER, MARKS, SECONDS_BETWEEN_QUERIES, remove_end_marks

SECONDS_BETWEEN_LOOKS = 0.5

SECONDS_WHILE_JOBS_END = 60.0
"""Maximum time between two questions to SLURM while jobs end by their marks: some may have ended without one."""

MOST_HURRIES = 3
"""Number of times that SLURM is asked at once for a job that says that it failed: it takes a moment to end the job."""


class EndWatch:
    """The looks at the jobs of one run."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked = clock()
        self._hurried: Counter[str] = Counter()
        self.jobs: Set[str] = frozenset()
        """The jobs on SLURM at the present look."""
        self.asks_slurm = True
        """Whether the present look asks SLURM."""
        self.is_told_by_slurm = False
        """Whether SLURM told the present look of the end of a job that left no mark."""
        self.completed: Set[str] = frozenset()
        """The jobs that have completed, by their marks, at the present look."""

    def rest(self) -> None:
        """Note that no job is on SLURM, so that it need not be asked."""
        self._asked = self._clock()

    def is_due(self, jobs: Set[str], seconds: float) -> bool:
        """Return whether to look: a job has completed by its mark, or SLURM is to be asked.

        `jobs` are those on SLURM; `seconds` are the time between two questions to SLURM while nothing happens.
        """
        marks = read_marks()
        return bool(_select(marks, "COMPLETED", jobs)) or self._is_slurm_due(marks, jobs, seconds)

    def look(self, jobs: Set[str], seconds: float) -> None:
        """Begin a look: read the marks, and decide whether to ask SLURM too. For the arguments, see `is_due`."""
        marks = read_marks()
        self.jobs, self.is_told_by_slurm = jobs, False
        self.completed = _select(marks, "COMPLETED", jobs)
        self.asks_slurm = self._is_slurm_due(marks, jobs, seconds)
        if self.asks_slurm:
            self._asked = self._clock()
            self._hurried.update(_select(marks, "FAILED", jobs))

    def note_ended(self, jobs: Set[str]) -> None:
        """Note the jobs that have ended by SLURM's answer."""
        self.is_told_by_slurm = bool((jobs & self.jobs) - {job for job, _ in read_marks()})

    def forget(self, jobs: Set[str]) -> None:
        """Remove the marks of jobs whose ends are known. Else each look would read those of the whole sweep."""
        if folder := os.environ.get(FOLDER):
            for job in jobs:
                remove_end_marks(Path(folder), job)

    def _is_slurm_due(self, marks: Set[tuple[str, str]], jobs: Set[str], seconds: float) -> bool:
        hurry = any(self._hurried[job] < MOST_HURRIES for job in _select(marks, "FAILED", jobs))
        wait = SECONDS_BETWEEN_QUERIES if hurry else max(seconds, SECONDS_BETWEEN_QUERIES)
        return self._clock() - self._asked >= wait


def read_marks() -> Set[tuple[str, str]]:
    """Return the jobs that said that they end, each with `COMPLETED` or `FAILED`."""
    folder = os.environ.get(FOLDER)
    try:
        names = os.listdir(Path(folder, MARKS)) if folder else []
    except OSError:  # none yet
        names = []
    return {(job, state) for job, _, state in (name.partition(".") for name in names)}


def _select(marks: Set[tuple[str, str]], state: str, jobs: Set[str]) -> Set[str]:
    return {job for job, said in marks if said == state} & jobs
