"""How the jobs of a sweep follow each other, and what lies on disk meanwhile: a simulation for the plan."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from lorasweep.stages import PRIORITIES

"""Which of the jobs that could start does: evaluations before trainings, as the rules say."""


@dataclass(frozen=True)
class PlannedJob:
    """A job that takes time, and what it does to the disk."""

    rule: str
    points: tuple[str, ...]
    seconds: float
    after: tuple[int, ...] = ()
    """Where the jobs that it waits for stand in the plan."""
    kept: int = 0
    """Bytes that stay when it has ended."""
    temporary: int = 0
    """Bytes that are there while it runs."""
    elsewhere: int = 0
    """Bytes that it has in its node's temporary folder meanwhile."""
    merged_models: int = 0

    @property
    def written(self) -> int:
        """Bytes that it writes."""
        return self.kept + self.temporary + self.elsewhere


@dataclass
class Timeline:
    """What was simulated."""

    seconds: float = 0.0
    """From the start of the first job to the end of the last."""
    kept: int = 0
    """Bytes at the end, beside what was there before."""
    peak_temporary: int = 0
    """Most bytes of temporary files at any moment."""
    moments: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds, bytes kept, bytes that are temporary: after each change."""


def simulate(jobs: Sequence[PlannedJob], parallel: int, max_merged_models: int | None) -> Timeline:
    """Run jobs on so many places, each as soon as one is free and what it waits for has ended."""
    waits_for = [len(job.after) for job in jobs]
    followers: list[list[int]] = [[] for _ in jobs]
    for index, job in enumerate(jobs):
        for before in job.after:
            followers[before].append(index)
    ready: list[tuple[int, int]] = []
    held_back: deque[tuple[int, int]] = deque()  # by the bound on merged models
    running: list[tuple[float, int, int]] = []
    order = count()
    line = Timeline()
    now, kept, temporary, free, merged = 0.0, 0, 0, parallel, max_merged_models or len(jobs)

    def note() -> None:
        line.moments.append((now, kept, temporary))
        line.peak_temporary = max(line.peak_temporary, temporary)

    for index, left in enumerate(waits_for):
        if not left:
            heapq.heappush(ready, (PRIORITIES[jobs[index].rule], index))
    note()
    while ready or running or held_back:
        while free and ready:
            entry = heapq.heappop(ready)
            job = jobs[entry[1]]
            if job.merged_models > merged:
                held_back.append(entry)
                continue
            free, merged, temporary = free - 1, merged - job.merged_models, temporary + job.temporary
            heapq.heappush(running, (now + job.seconds, next(order), entry[1]))
            note()
        now, _, index = heapq.heappop(running)
        job = jobs[index]
        free, merged = free + 1, merged + job.merged_models
        kept, temporary = kept + job.kept, temporary - job.temporary
        note()
        if job.merged_models and held_back:
            heapq.heappush(ready, held_back.popleft())
        for follower in followers[index]:
            waits_for[follower] -= 1
            if not waits_for[follower]:
                heapq.heappush(ready, (PRIORITIES[jobs[follower].rule], follower))
    line.seconds, line.kept = now, kept
    return line
