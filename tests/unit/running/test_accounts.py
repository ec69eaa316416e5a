"""What the records of a run's jobs say of their work, and what later plans learn from it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasweep.checkpoints.shapes import read_shape
from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import get_points
from lorasweep.layout import get_part_file
from lorasweep.planning.costs import Base, Costs, TaskSize
from lorasweep.planning.forecast import Forecast
from lorasweep.planning.history import JobRecord, learn
from lorasweep.planning.lengths import Lengths
from lorasweep.planning.planner import Planner
from lorasweep.planning.view import describe_times
from lorasweep.running.accounts import make_records
from lorasweep.running.events import Attempt
from lorasweep.util.files import write_record
from plain_checkpoint import write_checkpoint

POINTS = ("lora_rank=2", "lora_rank=4")


def make_forecast(tmp_path: Path, factors: Mapping[str, float] | None = None, **sections: Any) -> Forecast:
    """Two trainings of four epochs. An epoch takes about as long as a load."""
    config = {
        "experiment": {"name": "e"},
        "variables": {"lora_rank": [2, 4]},
        "model": {"path": str(write_checkpoint(tmp_path / "model")), "device": "cpu"},
        "data": {"train": "train.jsonl", "validation": "held_out.jsonl"},
        "controls": {"epochs": 4, **sections.pop("controls", {})},
        "evaluation": {"tasks": ["tasks.py@t"], **sections.pop("evaluation", {})},
        "plan": {"devices": {"slow": {"bf16_flops": 1e6, "fp32_flops": 1e6, "bandwidth": 1e9, "memory": 1e9}}},
        **sections,
    }
    config["plan"]["device"] = "slow"
    experiment = load_experiment(config, "e.yaml")
    points = get_points(experiment, tmp_path / "points.json")
    points = {name: replace(point, training=f"{name}-123") for name, point in points.items()}
    base = Base(experiment.choose_model(None), read_shape(tmp_path / "model"), "x")
    lengths = Lengths.count(experiment.data, [[0, 10]] * 100)
    costs = Costs(experiment, base, lengths, {"t": TaskSize(9, 9)}, factors or {}, validation=TaskSize(9, 9))
    planner = Planner(experiment, points, {}, dict.fromkeys(points, costs), parallel=1)
    wanted = {("train", name) for name in points}
    for after in experiment.rungs:
        wanted |= {("prune", f"after={after}"), *(("train_part", f"{name}__after={after}") for name in points)}
    results = tmp_path / "results/e"
    results.mkdir(parents=True, exist_ok=True)
    return Forecast(experiment, results, planner, {}, [], wanted, {})


def record(forecast: Forecast, *jobs: tuple[str, str, float]) -> list[JobRecord]:
    """Return the records of jobs that were done: of each its rule, its name, and its seconds."""
    attempts = [Attempt(rule, name, "done", seconds, None) for rule, name, seconds in jobs]
    return make_records(forecast, "1", attempts, {})


def learn_factors(records: list[JobRecord]) -> dict[str, float]:
    return {rule: found.factor for rule, found in learn([records], records[0].device, "x").items()}


def get_times(forecast: Forecast) -> tuple[float, float]:
    """Return the modelled seconds of a load, and of an epoch of the first point."""
    [costs, *_] = forecast.planner.costs.values()
    load = costs.model("train", [])
    return load, (costs.model("train", [forecast.planner.points[POINTS[0]]]) - load) / 4


def test_the_parts_of_a_training_each_pay_a_whole_load_and_teach_the_factor_that_they_had(tmp_path: Path) -> None:
    forecast = make_forecast(tmp_path, prune={"after": [1, 2]})
    load, epoch = get_times(forecast)
    assert 0.2 < epoch / load < 5
    part = 1.5 * (load + epoch)
    [name, _] = POINTS
    jobs = [("train_part", f"{name}__after={after}", part) for after in (1, 2)]
    records = record(forecast, *jobs, ("train", name, 1.5 * (load + 2 * epoch)))
    assert learn_factors(records) == pytest.approx({"train_part": 1.5, "train": 1.5}, rel=1e-3)


def test_a_training_that_prune_had_stopped_teaches_nothing(tmp_path: Path) -> None:
    forecast = make_forecast(tmp_path, prune={"after": [1, 2]})
    [name, other] = POINTS
    write_record(get_part_file(forecast.results, f"{name}-123", 2), {"after": 2, "stopped": 1})
    jobs = [("train_part", f"{each}__after=2", 9.0) for each in (name, other)]
    stopped, trained = record(forecast, *jobs)
    assert (stopped.modelled_seconds, trained.modelled_seconds > 0) == (0, True)


def test_a_training_that_is_out_of_patience_paid_a_load_and_the_epochs_that_it_had(tmp_path: Path) -> None:
    forecast = make_forecast(tmp_path, controls={"patience": 1}, evaluation={"epochs": "best"})
    load, epoch = get_times(forecast)
    adapter = forecast.results / f"trainings/{POINTS[0]}-123/adapter"
    adapter.mkdir(parents=True)
    (adapter / "lorasweep.json").write_text(json.dumps({"best_epoch": {"epoch": 1, "epochs_trained": 2}}))
    [found] = record(forecast, ("train", POINTS[0], 9.0))
    assert found.modelled_seconds == pytest.approx(load + 2 * epoch, abs=1e-3)
    assert found.planned_seconds == pytest.approx(load + 4 * epoch, abs=1e-3)


def test_a_decision_by_a_task_is_corrected_as_evaluations_of_adapters_are(tmp_path: Path) -> None:
    prune = {"after": [1, 2], "by": {"task": "tasks.py@dev"}}
    forecast = make_forecast(tmp_path, prune=prune)
    decisions = record(forecast, ("prune", "after=1", 9.0), ("prune", "after=2", 9.0))
    # The second scores half of the trainings.
    assert decisions[0].planned_seconds > decisions[1].planned_seconds > 0
    assert [each.modelled_seconds for each in decisions] == [0, 0]
    slower = make_forecast(tmp_path / "slower", {"evaluate_adapters": 3.0}, prune=prune)
    assert slower.jobs["prune", "after=1"].seconds == pytest.approx(3 * decisions[0].planned_seconds, abs=0.01)


def test_the_plan_names_no_rule_as_only_modelled_that_is_corrected_as_another(tmp_path: Path) -> None:
    found = learn([record(make_forecast(tmp_path), ("train", POINTS[0], 9.0))], "slow", "x")
    said = describe_times(found, ["train", "train_part", "prune"], "slow")
    assert "1 jobs); modelled only: prune." in said
