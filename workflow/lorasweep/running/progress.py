"""Progress of a run: its points by stage, and the time left, from the plan and from the durations so far."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorasweep.planning.forecast import Forecast
from lorasweep.planning.history import DONE
from lorasweep.running.events import Attempt, Running
from lorasweep.stages import ADAPTER_RULES, TRAINING_RULES

WAITING, TRAINING, TRAINED, EVALUATING, DONE_STAGE, FAILED_STAGE = STAGES = (
    *("waiting", "training", "trained", "evaluating", "done", "failed"),
)
"""Stages of a point. `evaluating`: from the merge to the end of the clean-up. `trained`: waiting for the merge."""


def count_stages(
    forecast: Forecast, attempts: Iterable[Attempt], running: Iterable[Running], failed: Collection[str]
) -> dict[str, int]:
    """Return the number of points in each stage; `failed` are the points with a failed job."""
    ended = {(attempt.rule, attempt.name) for attempt in attempts if attempt.state == DONE}
    after = [job for job in ended if job[0] not in ("collect", *ADAPTER_RULES)]
    evaluated = {member for rule, name in after for member in forecast.get_members(rule, name)}
    points = forecast.planner.points
    trained_by = {name: point.trained_by for name, point in points.items() if point.trained_by}
    busy: dict[str, str] = {}
    for job in running:
        if job.rule != "configure":
            stage = TRAINING if job.rule in ADAPTER_RULES else EVALUATING
            busy |= dict.fromkeys(forecast.get_members(job.rule, job.name), stage)
    for checkpoint, training in trained_by.items():
        if busy.get(training) == TRAINING:
            busy.setdefault(checkpoint, TRAINING)

    untrained = {point.name for point in forecast.points if point.mode == "base"}

    def find_stage(name: str, was_done: bool) -> str:
        if name in busy:
            return busy[name]
        if name in failed or trained_by.get(name) in failed:
            return FAILED_STAGE
        if was_done or ("cleanup", name) in ended:
            return DONE_STAGE
        if name in evaluated:
            return EVALUATING
        is_to_end = name not in untrained and ("cleanup", name) in forecast.wanted
        trained = ((rule, trained_by.get(name, name)) for rule in TRAINING_RULES)
        own = (*trained, ("take", name), ("adopt", name))
        trainings = [job for job in own if job in forecast.wanted]
        return TRAINED if is_to_end and ended.issuperset(trainings) else WAITING

    counts = dict.fromkeys(STAGES, 0)
    for point in forecast.points:
        counts[find_stage(point.name, point.is_done)] += 1
    return counts


class StepWatch:
    """Estimate the time left of trainings from their own speed, so that queueing and loading do not distort it."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[float, int]] = {}

    def estimate_left(self, point: str, step: int, steps: int, now: float) -> float | None:
        """Return the seconds until the last step; `None` on the first call. `now` is in seconds of any clock."""
        began, first = self._first.setdefault(point, (now, step))
        if step < first:  # restarted from an earlier step
            self._first[point] = (now, step)
        return (steps - step) * (now - began) / (step - first) if step > first else None


@dataclass(frozen=True)
class TimeLeft:
    """Estimated time left of a run."""

    seconds: float | None
    """Seconds left; `None` if all remaining jobs already run for longer than planned."""
    error: float | None
    """Ratio of measured to planned time of the jobs so far; `None` if no job is done."""
    jobs: Mapping[tuple[str, str], float]
    """Seconds left of running jobs, by rule and name, where known."""


def estimate_left(
    forecast: Forecast, attempts: Sequence[Attempt], running: Sequence[Running], trainings: Mapping[str, float]
) -> TimeLeft:
    """Simulate the rest of the plan, with the times of each rule scaled by its measured/planned ratio in this run.

    `trainings` are the seconds left of running trainings, by point, where known. A rule without a finished job uses the
    ratio of all rules. A running job counts as soon as it takes longer than planned.
    """
    plan = forecast.jobs
    took: dict[str, float] = {}
    planned: dict[str, float] = {}

    def count(rule: str, name: str, seconds: float) -> None:
        took[rule] = took.get(rule, 0.0) + seconds
        planned[rule] = planned.get(rule, 0.0) + plan[rule, name].seconds

    done = [attempt for attempt in attempts if attempt.state == DONE and (attempt.rule, attempt.name) in plan]
    elapsed = {(job.rule, job.name): job.seconds for job in running if (job.rule, job.name) in plan}
    by_own_speed = {key: trainings[key[1]] for key in elapsed if key[0] in TRAINING_RULES and key[1] in trainings}
    for attempt in done:
        count(attempt.rule, attempt.name, attempt.seconds)
    for key, seconds in elapsed.items():
        if key in by_own_speed or seconds > plan[key].seconds:
            count(*key, seconds + by_own_speed.get(key, 0.0))
    error = sum(took.values()) / sum(planned.values()) if sum(planned.values()) else None
    factors = {rule: took[rule] / planned[rule] for rule in took if planned[rule]}
    seconds_left = {key: job.seconds * factors.get(job.rule, error or 1.0) for key, job in plan.items()}
    seconds_left |= {key: max(0.0, seconds_left[key] - seconds) for key, seconds in elapsed.items()}
    seconds_left |= by_own_speed | dict.fromkeys(((attempt.rule, attempt.name) for attempt in done), 0.0)
    jobs = [replace(job, seconds=seconds_left[key]) for key, job in plan.items()]
    line = forecast.planner.simulate(jobs)
    running_left = {key: seconds_left[key] for key in elapsed if seconds_left[key] or key in by_own_speed}
    return TimeLeft(line.seconds if line.seconds or len(running_left) == len(elapsed) else None, error, running_left)
