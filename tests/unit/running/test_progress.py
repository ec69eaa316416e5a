"""How far a run has come: points by stage, and the time that is left by the plan and by what jobs took so far."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lorasweep.checkpoints.shapes import read_shape
from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import get_baselines, get_points
from lorasweep.planning.costs import Base, Costs
from lorasweep.planning.forecast import Forecast
from lorasweep.planning.lengths import Lengths
from lorasweep.planning.planner import Planner
from lorasweep.running.accounts import Accounts
from lorasweep.running.events import Attempt, FailureRecorder, JobWatcher, Running
from lorasweep.running.progress import StepWatch, count_stages, estimate_left
from lorasweep.running.status import read_status
from lorasweep.running.status_view import is_queued
from lorasweep.running.storage_log import read_storage
from plain_checkpoint import write_checkpoint

POINTS = ("lora_rank=2", "lora_rank=4", "lora_rank=8")
"""Of two of them one job evaluates both."""

BATCH = "lora_rank=2+1"


@pytest.fixture
def forecast(tmp_path: Path) -> Forecast:
    config = {
        "experiment": {"name": "e"},
        "variables": {"lora_rank": [2, 4, 8]},
        "model": {"path": str(write_checkpoint(tmp_path / "model")), "device": "cpu"},
        "data": {"train": "train.jsonl"},
        "evaluation": {"tasks": ["tasks.py@t"], "merge_adapters": False},
    }
    experiment = load_experiment(config, "e.yaml")
    points = get_points(experiment, tmp_path / "points.json")
    baselines = get_baselines(experiment, points)
    base = read_shape(tmp_path / "model")
    costs = Costs(
        experiment, Base(experiment.choose_model(None), base, "x"), Lengths.count(experiment.data, [[0, 10]] * 100)
    )
    planner = Planner(experiment, points, baselines, dict.fromkeys([*points, *baselines], costs), parallel=1)
    batches = {BATCH: POINTS[:2], "lora_rank=8": POINTS[2:]}
    wanted = {("evaluate_adapters", batch) for batch in batches} | {("collect", ""), ("evaluate", "baseline")}
    wanted |= {(rule, point) for rule in ("configure", "train", "publish", "cleanup") for point in POINTS}
    wanted |= {("cleanup", "baseline")}
    results = tmp_path / "results/e"
    results.mkdir(parents=True)
    return Forecast(experiment, results, planner, {}, [], wanted, batches)


def done(rule: str, name: str, seconds: float = 1.0) -> Attempt:
    return Attempt(rule, name, "done", seconds, None)


def count(forecast: Forecast, attempts: list[Attempt], running: list[Running], failed: set[str]) -> dict[str, int]:
    return {stage: n for stage, n in count_stages(forecast, attempts, running, failed).items() if n}


def test_each_point_is_in_the_stage_that_its_jobs_say(forecast: Forecast) -> None:
    assert count(forecast, [], [], set()) == {"waiting": 4}
    running = [Running("train", POINTS[0], 1.0, None), Running("configure", POINTS[1], 1.0, None)]
    assert count(forecast, [], running, set()) == {"waiting": 3, "training": 1}
    attempts = [done("train", POINTS[0]), Attempt("train", POINTS[1], "failed", 1.0, None)]
    assert count(forecast, attempts, [], {POINTS[1]}) == {"waiting": 2, "trained": 1, "failed": 1}
    # A retry of what failed is no failure any more.
    assert count(forecast, attempts, [Running("train", POINTS[1], 1.0, "7")], {POINTS[1]})["training"] == 1
    attempts = [done("train", point) for point in POINTS]
    assert count(forecast, attempts, [Running("evaluate_adapters", BATCH, 1.0, None)], set()) == {
        "waiting": 1,
        "trained": 1,
        "evaluating": 2,
    }
    # What is evaluated and not cleaned up is not done, and does not wait.
    assert count(forecast, [*attempts, done("evaluate", "baseline")], [], set()) == {"trained": 3, "evaluating": 1}
    attempts += [done("publish", POINTS[0]), done("cleanup", POINTS[0]), done("cleanup", "baseline")]
    assert count(forecast, attempts, [], set()) == {"trained": 2, "done": 2}
    # Of a run that only configures nothing is known to be trained.
    configured = replace(forecast, wanted={("configure", point) for point in POINTS})
    assert count(configured, [], [], set()) == {"waiting": 4}


def test_the_time_left_is_the_plans_until_something_is_known(forecast: Forecast) -> None:
    left = estimate_left(forecast, [], [], {})
    assert left.seconds == pytest.approx(forecast.remaining.wall_seconds)
    assert left.error is None


def test_the_time_left_is_scaled_by_what_the_jobs_of_a_rule_took(forecast: Forecast) -> None:
    plan = {key: job.seconds for key, job in forecast.jobs.items()}
    train = plan["train", POINTS[0]]
    rest = sum(plan.values()) - train
    trainings = rest - sum(seconds for (rule, _), seconds in plan.items() if rule != "train")
    left = estimate_left(forecast, [done("train", POINTS[0], 3 * train)], [], {})
    # Nothing is known of evaluations but that the run takes three times its plan.
    assert left.error == pytest.approx(3)
    assert left.seconds == pytest.approx(3 * rest)
    evaluation = plan["evaluate", "baseline"]
    attempts = [done("train", POINTS[0], 3 * train), done("evaluate", "baseline", evaluation)]
    others = sum(plan["evaluate_adapters", batch] for batch in forecast.batches)
    left = estimate_left(forecast, attempts, [], {})
    assert left.seconds == pytest.approx(3 * trainings + left.error * others)


def test_what_runs_is_less_by_what_it_took_and_longer_once_it_is_late(forecast: Forecast) -> None:
    key = ("train", POINTS[0])
    planned = forecast.jobs[key].seconds
    half = estimate_left(forecast, [], [Running(*key, planned / 2, None)], {})
    assert half.jobs == {key: pytest.approx(planned / 2)}
    assert half.seconds == pytest.approx(forecast.remaining.wall_seconds - planned / 2)
    late = estimate_left(forecast, [], [Running(*key, 2 * planned, None)], {})
    assert late.error == pytest.approx(2)
    assert late.jobs == {}
    alone = replace(forecast, wanted={key})
    assert estimate_left(alone, [], [Running(*key, 2 * planned, None)], {}).seconds is None


def test_a_training_that_tells_its_steps_is_believed_before_the_plan(forecast: Forecast) -> None:
    key = ("train", POINTS[0])
    planned = forecast.jobs[key].seconds
    alone = replace(forecast, wanted={key, ("train", POINTS[1])})
    left = estimate_left(alone, [], [Running(*key, 2 * planned, None)], {POINTS[0]: 3 * planned})
    assert left.jobs == {key: pytest.approx(3 * planned)}
    assert left.error == pytest.approx(5)
    assert left.seconds == pytest.approx(3 * planned + 5 * forecast.jobs["train", POINTS[1]].seconds)


def test_the_pace_of_a_training_is_that_between_two_looks() -> None:
    steps = StepWatch()
    assert steps.estimate_left("a", 10, 100, now=1000.0) is None
    assert steps.estimate_left("a", 30, 100, now=1040.0) == pytest.approx(70 * 2)
    assert steps.estimate_left("b", 50, 100, now=1040.0) is None
    # Of a second attempt nothing is known from the first.
    assert steps.estimate_left("a", 5, 100, now=1050.0) is None
    assert steps.estimate_left("a", 6, 100, now=1060.0) == pytest.approx(94 * 10)


def test_the_accounts_of_a_run_leave_status_and_storage(forecast: Forecast) -> None:
    accounts = Accounts(forecast, JobWatcher({}), FailureRecorder(forecast.results / "logs", {}))
    accounts.start()
    accounts.stop(is_well=False)
    status = read_status(forecast.results / "status.json")
    assert status is not None
    assert status.outcome == "interrupted"
    assert (status.jobs, status.jobs_done, status.running) == (len(forecast.wanted), 0, [])
    assert sum(status.points.values()) == 4
    assert read_storage(forecast.results / "storage.csv")[-1].temporary_bytes == 0


def test_a_training_on_slurm_is_queued_until_its_log_is_there(forecast: Forecast) -> None:
    results = forecast.results
    log = results / "logs/train/a-0123456789.log"
    watcher = JobWatcher({"a-0123456789": POINTS[0]})
    job = {"jobid": 3, "rule_name": "train", "wildcards": {"training": "a-0123456789"}, "log": [str(log)]}
    for fields in ({"event": "job_info", **job}, {"event": "job_started", "jobs": [3]}):
        watcher.emit(logging.makeLogRecord(fields))
    watcher.emit(logging.makeLogRecord({"msg": "Job 3 has been submitted with SLURM jobid 17 (log: x)."}))
    accounts = Accounts(forecast, watcher, FailureRecorder(results / "logs", {}))
    accounts.start()
    while not (status := read_status(results / "status.json")):
        time.sleep(0.05)
    [running] = status.running
    assert is_queued(results, running)
    log.parent.mkdir(parents=True)
    log.touch()
    assert not is_queued(results, running)
    accounts.stop(is_well=False)
