"""Plans of sweeps whose trainings may stop early, and what they refuse."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep import ROOT, SUMMED_UP, Sweep

LETTERS = '{"input": "after a", "output": "b"}\n'


@pytest.fixture
def sweep(make: Callable[..., Sweep]) -> Sweep:
    sweep = make(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6]})
    (sweep.directory / "held_out.jsonl").write_text(LETTERS)
    sweep.edit(
        controls={"epochs": 4},
        data={"validation": "held_out.jsonl"},
        prune={"after": [1, 2], "keep": 0.5},
        evaluation={"enabled": False},
    )
    return sweep


def test_each_training_has_a_part_before_each_comparison(sweep: Sweep) -> None:
    jobs = {"configure": 4, "train_part": 8, "prune": 2, "train": 4, "take": 4, "cleanup": 4, **SUMMED_UP}
    assert sweep.plan() == jobs
    said = sweep.run("--dry-run", "--printshellcmds")
    assert len(re.findall(r"job train .*--epochs last --until 1 ", said)) == 4
    assert len(re.findall(r"job train .*--epochs last --rungs 1 --until 2 ", said)) == 4
    assert len(re.findall(r"job train .*--epochs last --rungs 1,2 --last-epoch 4 ", said)) == 4
    assert len(re.findall(r"job prune --results results/planned --after [12] --gpus 0 ", said)) == 2
    assert "prune: of 4 trainings, 2 after epoch 1, 1 after epoch 2 go on, without ties" in said
    del sweep.config["prune"]
    sweep.write()
    assert sweep.plan() == {rule: number for rule, number in jobs.items() if rule not in ("train_part", "prune")}


def test_the_plan_has_the_time_with_and_without(sweep: Sweep) -> None:
    said = sweep.call("plan", "--cores", "2")
    assert "without" in said
    plan = json.loads((sweep.results / "plan.json").read_text())
    assert plan["to_do"]["jobs"] == plan["whole"]["jobs"] == sweep.plan()
    with_, without = plan["whole"], plan["without_prune"]
    assert without["jobs"]["train"] == 4
    assert "train_part" not in without["jobs"]
    # Half of the settings train the second quarter, a quarter of them the last half.
    assert with_["steps"] == without["steps"] * (0.25 + 0.5 * 0.25 + 0.25 * 0.5)
    assert with_["kept_bytes"] == without["kept_bytes"]
    assert with_["temporary_bytes"] > without["temporary_bytes"]


def test_points_of_one_training_have_its_parts_once(sweep: Sweep) -> None:
    sweep.edit(variables={"lr": [1e-3, 1e-4], "mode": ["A", "B1"]})
    plan = sweep.plan()
    assert [plan[rule] for rule in ("train_part", "prune", "train", "take")] == [4, 2, 2, 4]


def test_a_task_that_decides_is_asked_once_for_all(sweep: Sweep) -> None:
    dev = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 3}}
    sweep.edit(prune={"after": [1], "keep": 0.5, "by": dev}, model={"device": "cuda"})
    assert sweep.plan()["prune"] == 1
    said = sweep.run("--dry-run", "--printshellcmds", "--resources", "gpu=1")
    assert len(re.findall(r"eval -m lorasweep job prune .* --after 1 --gpus 1 ", said)) == 1
    sweep.call("plan", "--cores", "2")
    plan = json.loads((sweep.results / "plan.json").read_text())
    assert plan["whole"]["gpu_hours"]["prune"] > 0


def test_a_change_of_the_rule_trains_nothing_of_what_was_not_begun(sweep: Sweep) -> None:
    sweep.run("configure_all")
    for prune in ({"after": [1]}, {"after": [1, 2, 3], "keep": 1.0}):
        sweep.edit(prune={"keep": 0.5, **prune})
        plan = sweep.plan()
        assert "configure" not in plan
        assert plan["prune"] == len(prune["after"])  # type: ignore[arg-type]


def write_numbers(sweep: Sweep, after: int, losses: dict[str, float]) -> None:
    """Leave the records of parts of trainings, by their points."""
    for point, loss in losses.items():
        name = sweep.find_training(point).name
        record = sweep.results / f"prune/{name}__after={after}.json"
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"after": after, "validation_loss": loss}))


FIRST = {"lr=1e-3": 0.1, "lr=1e-4": 0.2, "lr=1e-5": 0.3, "lr=1e-6": 0.4}
SECOND = {"lr=1e-3": 0.1, "lr=1e-4": 0.2, "lr=1e-5": 0.3}


def read_stopped(sweep: Sweep, after: int) -> set[str]:
    decision = json.loads((sweep.results / f"prune/after={after}.json").read_text())
    return {point for each in decision["trainings"].values() if not each["stays"] for point in each["points"]}


def test_a_decision_waits_for_the_one_before_if_that_is_another_now(sweep: Sweep) -> None:
    """Otherwise no decision names who stops by the first, and all those would be trained to the end."""
    last = "results/planned/prune/after=2.json"
    sweep.edit(prune={"keep": 0.75})
    sweep.run("configure_all")
    write_numbers(sweep, 1, FIRST)
    sweep.run("results/planned/prune/after=1.json")
    assert read_stopped(sweep, 1) == {"lr=1e-6"}
    write_numbers(sweep, 2, SECOND)
    assert sweep.plan()["prune"] == 1
    sweep.edit(prune={"keep": 0.5})
    assert sweep.plan()["prune"] == 2
    sweep.run(last)
    assert [read_stopped(sweep, after) for after in (1, 2)] == [{"lr=1e-5", "lr=1e-6"}, {"lr=1e-4"}]
    # One setting fewer, so that fewer go on.
    sweep.edit(variables={"lr": [1e-3, 1e-4]})
    assert sweep.plan()["prune"] == 2
    sweep.run(last)
    assert [read_stopped(sweep, after) for after in (1, 2)] == [{"lr=1e-4"}, set()]


def test_an_earlier_comparison_is_decided_before_a_later_one_whose_numbers_are_known(sweep: Sweep) -> None:
    sweep.run("configure_all")
    write_numbers(sweep, 1, SECOND)
    write_numbers(sweep, 2, FIRST)
    plan = sweep.plan()
    assert [plan["train_part"], plan["prune"]] == [1, 2]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"prune": {"after": [4]}},
        "prune.after: 4 is not before the last epoch of 'lr=1e-3', 'lr=1e-4', 'lr=1e-5' and 1 more",
    ),
    ({"evaluation": {"epochs": "all"}}, "prune: does not go with evaluation.epochs: all"),
    ({"data": {"validation": None}}, "prune.by: 'validation_loss' is invalid without data.validation"),
    ({"trainer": "plain_trainer"}, "prune: does not go with trainer: plain_trainer, which has no CAN_PAUSE = True"),
    (
        {"prune": {"after": [1], "by": {"task": "tasks.py@letters"}}},
        "prune.by: 'tasks.py@letters' has the samples of evaluation.tasks.0 ('letters')",
    ),
    ({"prune": {"after": [1], "by": {"task": "tasks.py@none", "name": "dev"}}}, "prune.by: 'tasks.py@none' is invalid"),
    ({"runs": [{"name": "prune"}]}, "'prune' is a reserved name"),
]


@pytest.mark.parametrize(("sections", "said"), REFUSED)
def test_what_prune_does_not_go_with_is_refused(sweep: Sweep, sections: dict[str, Any], said: str) -> None:
    sweep.environment["PYTHONPATH"] = str(ROOT / "tests")
    sweep.edit(**sections)
    done = sweep.snakemake("--dry-run")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert not Path(sweep.results / "prune").exists()
