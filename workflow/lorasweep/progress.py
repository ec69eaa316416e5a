"""How far a run has come: its points by stage, and how long it still takes by its plan and by what it took so far."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorasweep.forecast import Forecast
from lorasweep.job_records import DONE
from lorasweep.job_watcher import Attempt, Running
from lorasweep.points import BASELINE
from lorasweep.timeline import PlannedJob, simulate

WAITING, TRAINING, TRAINED, EVALUATING, DONE_STAGE, FAILED_STAGE = STAGES = (
    *("waiting", "training", "trained", "evaluating", "done", "failed"),
)
"""Of a point. Evaluating has the merge before it and the clean-up after it; trained is one that waits for that."""

_TRAINING_RULES = ("train", "adopt")


def count_stages(
    forecast: Forecast, attempts: Iterable[Attempt], running: Iterable[Running], failed: Collection[str]
) -> dict[str, int]:
    """Return how many points are in each stage; `failed` are those with a job that failed."""
    ended = {(attempt.rule, attempt.name) for attempt in attempts if attempt.state == DONE}
    busy: dict[str, str] = {}
    for job in running:
        if job.rule != "configure":
            stage = TRAINING if job.rule in _TRAINING_RULES else EVALUATING
            busy |= dict.fromkeys(forecast.get_members(job.rule, job.name), stage)

    def find_stage(name: str, was_done: bool) -> str:
        if name in busy:
            return busy[name]
        if name in failed:
            return FAILED_STAGE
        if was_done or ("cleanup", name) in ended:
            return DONE_STAGE
        is_begun = name != BASELINE and name in forecast.unfinished
        trainings = [(rule, name) for rule in _TRAINING_RULES if (rule, name) in forecast.wanted]
        return TRAINED if is_begun and ended.issuperset(trainings) else WAITING

    counts = dict.fromkeys(STAGES, 0)
    for point in forecast.points:
        counts[find_stage(point.name, point.is_done)] += 1
    return counts


@dataclass(frozen=True)
class TimeLeft:
    """How long a run still takes."""

    seconds: float
    error: float | None
    """How many times longer than planned its jobs took so far; none where none was done."""
    jobs: Mapping[tuple[str, str], float]
    """Seconds of what runs, by rule and name; of jobs that are planned to take time."""


def estimate_left(forecast: Forecast, attempts: Sequence[Attempt], running: Sequence[Running]) -> TimeLeft:
    """Simulate what is left of the plan, each rule's times as many times longer as they were in this run so far.

    A rule of which no job is done takes the factor of all. A job that takes longer than planned counts before its end.
    """
    plan = forecast.jobs
    took: dict[str, float] = {}
    planned: dict[str, float] = {}

    def count(rule: str, name: str, seconds: float) -> None:
        took[rule] = took.get(rule, 0.0) + seconds
        planned[rule] = planned.get(rule, 0.0) + plan[rule, name].seconds

    done = [attempt for attempt in attempts if attempt.state == DONE and (attempt.rule, attempt.name) in plan]
    for attempt in done:
        count(attempt.rule, attempt.name, attempt.seconds)
    for job in running:
        if (job.rule, job.name) in plan and job.seconds > plan[job.rule, job.name].seconds:
            count(job.rule, job.name, job.seconds)
    error = sum(took.values()) / sum(planned.values()) if sum(planned.values()) else None
    factors = {rule: took[rule] / planned[rule] for rule in took if planned[rule]}
    ended = {(attempt.rule, attempt.name) for attempt in done}
    elapsed = {(job.rule, job.name): job.seconds for job in running}

    def get_rest(key: tuple[str, str], job: PlannedJob) -> float:
        whole = job.seconds * factors.get(job.rule, error or 1.0)
        return 0.0 if key in ended else max(0.0, whole - elapsed.get(key, 0.0))

    rest = {key: get_rest(key, job) for key, job in plan.items()}
    jobs = [replace(job, seconds=rest[key]) for key, job in plan.items()]
    line = simulate(jobs, forecast.planner.parallel, forecast.experiment.evaluation.max_merged_models)
    return TimeLeft(line.seconds, error, {key: rest[key] for key in elapsed if key in rest})
