"""Simulate the order of a sweep's jobs and its disk usage over time, for the plan."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from lorasweep.stages import PRIORITIES


@dataclass(frozen=True)
class PlannedJob:
    """A job that takes time, and its disk usage."""

    rule: str
    points: tuple[str, ...]
    seconds: float
    after: tuple[int, ...] = ()
    """Indices, in the plan, of the jobs that this job waits for."""
    kept: int = 0
    """Bytes that remain after the job."""
    temporary: int = 0
    """Bytes on disk only while the job runs."""
    elsewhere: int = 0
    """Bytes in the node's temporary folder while the job runs."""
    merged_models: int = 0

    @property
    def written(self) -> int:
        """All bytes that the job writes."""
        return self.kept + self.temporary + self.elsewhere


@dataclass
class Timeline:
    """The result of a simulation."""

    seconds: float = 0.0
    """Wall time, from the start of the first job to the end of the last."""
    kept: int = 0
    """Bytes that the jobs leave on disk."""
    peak_temporary: int = 0
    """The most bytes of temporary files at one moment."""
    moments: list[tuple[float, int, int]] = field(default_factory=list)
    """(seconds, bytes kept, temporary bytes) after each change."""


def simulate(jobs: Sequence[PlannedJob], parallel: int, max_merged_models: int | None) -> Timeline:
    """Simulate jobs, `parallel` at a time: a job starts when a slot is free and its predecessors have ended.

    `max_merged_models` limits the merged models on disk at one time; `None`: no limit.
    """
    waits_for = [len(job.after) for job in jobs]
    followers: list[list[int]] = [[] for _ in jobs]
    for index, job in enumerate(jobs):
        for before in job.after:
            followers[before].append(index)
    ready: list[tuple[int, int]] = []
    held_back: deque[tuple[int, int]] = deque()  # waiting for max_merged_models
    running: list[tuple[float, int, int]] = []
    order = count()
    line = Timeline()
    now, kept, temporary, free, merged = 0.0, 0, 0, parallel, max_merged_models or len(jobs)

    def note() -> None:
        line.moments.append((now, kept, temporary))
        line.peak_temporary = max(line.peak_temporary, temporary)

    for index, predecessors in enumerate(waits_for):
        if not predecessors:
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
