"""When a run looks at its jobs' marks, and when it asks SLURM."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin

from lorasweep.running import slurm_plugin
from lorasweep.running.end_marks import EndWatch

JOBS = {"1", "2"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORASWEEP_SLURM", str(tmp_path))
    (tmp_path / "ended").mkdir()
    return tmp_path / "ended"


def test_a_completed_job_is_seen_without_asking_slurm(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    clock.now = 1
    assert not watch.is_due(JOBS, 40)
    (marks / "1.COMPLETED").touch()
    assert watch.is_due(JOBS, 40)
    watch.look(JOBS, 40)
    assert (watch.completed, watch.asks_slurm) == ({"1"}, False)


def test_a_mark_of_a_job_that_is_not_on_slurm_does_not_count(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    (marks / "7.COMPLETED").touch()
    (marks / "8.FAILED").touch()
    clock.now = 30
    assert not watch.is_due(JOBS, 40)


def test_a_job_without_a_mark_is_asked_for_when_it_is_time(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    clock.now = 40
    assert watch.is_due(JOBS, 40)
    watch.look(JOBS, 40)
    assert (watch.completed, watch.asks_slurm) == (set(), True)
    clock.now = 79
    assert not watch.is_due(JOBS, 40)


def test_a_failure_is_never_an_outcome_but_a_reason_to_ask_slurm_now(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    (marks / "2.FAILED").touch()
    asked = []
    for clock.now in range(100):  # whole seconds: every 5.5 s is every sixth
        if watch.is_due(JOBS, 180):
            watch.look(JOBS, 180)
            assert not watch.completed
            asked.append(clock.now)
    # Three times, with time between: SLURM may have queued the job again, and then says nothing of its end.
    assert asked == [6, 12, 18]


def test_slurm_is_asked_at_most_every_five_seconds_whatever_a_profile_says(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    asked = 0
    for tenth in range(600):
        clock.now = tenth / 10
        if watch.is_due(JOBS, 0):
            watch.look(JOBS, 0)
            asked += watch.asks_slurm
    assert asked == 10


def test_without_jobs_the_time_does_not_count(clock: Clock, marks: Path) -> None:
    watch = EndWatch(clock)
    clock.now = 1000
    watch.rest()
    clock.now = 1039
    assert not watch.is_due(JOBS, 40)


def test_the_plugin_takes_a_mark_for_the_end_of_a_job(monkeypatch: pytest.MonkeyPatch, marks: Path) -> None:
    asked: list[str] = []

    states: dict[str, str] = dict.fromkeys("123456", "RUNNING")
    ends_meanwhile: list[str] = []

    async def ask(command: str, logger: object) -> tuple[Any, Any]:
        asked.append(command)
        for job in ends_meanwhile:
            (marks / f"{job}.COMPLETED").touch()
            states[job] = "COMPLETED"
        ends_meanwhile.clear()
        return dict(states), 0.1

    async def check(self: Any, jobs: list[Any]) -> Any:
        states, _ = await plugin.query_job_status("squeue", None)
        ended = {job.external_jobid for job in jobs if states.get(job.external_jobid) == "COMPLETED"}
        self.next_seconds_between_status_checks = 1 if ended else self.next_seconds_between_status_checks + 10
        for job in jobs:
            if job.external_jobid not in ended:
                yield job

    for name in ("check_active_jobs", "sleep"):
        monkeypatch.setattr(plugin.Executor, name, check)
    monkeypatch.setattr(plugin, "query_job_status", ask)
    monkeypatch.setattr(plugin, "get_min_job_age", plugin.get_min_job_age)
    clock = Clock()
    watch = EndWatch(clock)
    slurm_plugin.mend_looks(watch)
    slurm_plugin.mend_status_queries(watch)
    jobs = [SimpleNamespace(external_jobid=job) for job in states]
    executor = SimpleNamespace(next_seconds_between_status_checks=45, active_jobs=jobs, wait=True)

    async def look() -> str:
        executor.active_jobs = [
            each async for each in plugin.Executor.check_active_jobs(executor, executor.active_jobs)
        ]
        return "".join(job.external_jobid for job in executor.active_jobs)

    (marks / "1.COMPLETED").touch()
    (marks / "2.FAILED").touch()
    assert asyncio.run(look()) == "23456"
    assert (asked, executor.next_seconds_between_status_checks) == ([], 45)
    # The mark of a job that is known to have ended is gone.
    assert [mark.name for mark in marks.iterdir()] == ["2.FAILED"]
    clock.now = 6
    asyncio.run(plugin.Executor.sleep(executor))
    assert asyncio.run(look()) == "23456"
    assert (len(asked), executor.next_seconds_between_status_checks) == (1, 55)
    # Ends that are seen by marks do not have SLURM asked more often, though it tells of them too ...
    clock.now = 12
    (marks / "3.COMPLETED").touch()
    states["3"] = "COMPLETED"
    assert asyncio.run(look()) == "2456"
    assert (len(asked), executor.next_seconds_between_status_checks) == (2, 60)
    # ... even if they come while it answers ...
    clock.now = 18
    ends_meanwhile.append("4")
    assert asyncio.run(look()) == "256"
    assert (len(asked), executor.next_seconds_between_status_checks) == (3, 60)
    # ... and one that it alone tells of does.
    clock.now = 90
    (marks / "5.COMPLETED").touch()
    states["6"] = "COMPLETED"
    assert asyncio.run(look()) == "2"
    assert (len(asked), executor.next_seconds_between_status_checks) == (4, 1)
