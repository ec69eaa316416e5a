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
    left: int = 0
    """Those of them that remain until a later job removes them; below 0, of that job."""
    reads_merged: bool = False
    """Whether the job evaluates a merged model, which is deleted at its end. A job of the rule `merge` made it."""
    merged: int = 0
    """Bytes of the merged model that the job makes or reads, in the file system of the results."""
    name: str = ""
    """Its name, if that is not the name of its first point or of its batch."""

    @property
    def written(self) -> int:
        """All bytes that the job writes, without a merged model."""
        return self.kept + self.temporary


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


def simulate(jobs: Sequence[PlannedJob], parallel: int, max_merged_models: int) -> Timeline:
    """Simulate jobs, `parallel` at a time: a job starts when a slot is free and its predecessors have ended.

    `max_merged_models` limits the merged models that exist at one time: from the start of a job of the rule `merge` to
    the end of the job that reads the model, or of itself if none does.
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
    # An earlier run left the models that are read but not merged in this plan.
    left = [job for job in jobs if job.reads_merged and not any(jobs[before].rule == "merge" for before in job.after)]
    merged = len(left)
    now, kept, temporary, free = 0.0, 0, sum(job.merged for job in left), parallel

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
            if job.rule == "merge":
                if merged >= max_merged_models:
                    held_back.append(entry)
                    continue
                merged, temporary = merged + 1, temporary + job.merged
            free, temporary = free - 1, temporary + job.temporary
            heapq.heappush(running, (now + job.seconds, next(order), entry[1]))
            note()
        now, _, index = heapq.heappop(running)
        job = jobs[index]
        free, kept, temporary = free + 1, kept + job.kept, temporary - job.temporary + job.left
        if job.reads_merged:
            temporary -= job.merged
        # A model that no planned job reads stays, and holds back no other.
        if job.reads_merged or (job.rule == "merge" and not followers[index]):
            merged -= 1
            if held_back:
                heapq.heappush(ready, held_back.popleft())
        note()
        for follower in followers[index]:
            waits_for[follower] -= 1
            if not waits_for[follower]:
                heapq.heappush(ready, (PRIORITIES[jobs[follower].rule], follower))
    line.seconds, line.kept = now, kept
    return line
