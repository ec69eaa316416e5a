"""Tasks by point: what a `when` and a run's list choose, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import get_points
from lorasweep.experiment.task_choice import choose_tasks, list_tasks
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.util.errors import InputError

NAMES = ("all", "some")


def choose(when: str | None = None, **sections: Any) -> dict[str, list[str]]:
    """Return the names of the tasks of each point that is evaluated. The second of two tasks has the condition."""
    tasks = [{"task": "package/all"}, {"task": "package/some", "when": when}]
    evaluation = {"tasks": tasks} | sections.pop("evaluation", {})
    config = {"experiment": {"name": "x"}, "model": {"path": "m"}, "data": {"train": "t"}, "evaluation": evaluation}
    experiment = load_experiment(config | sections, "my.yaml")
    entries = [TaskEntry(task.task.rpartition("/")[2], task, None) for task in experiment.evaluation.tasks]
    points = choose_tasks(experiment, entries, get_points(experiment, Path("none.json")))
    names = [entry.name for entry in entries]
    return {name: list_tasks(names, point) for name, point in points.items() if point.is_evaluated}


RANKS = {"lora_rank": [8, 16]}


def test_without_a_condition_every_point_is_evaluated_on_every_task() -> None:
    assert choose(variables=RANKS) == {"lora_rank=8": [*NAMES], "lora_rank=16": [*NAMES]}


@pytest.mark.parametrize(
    "when",
    [
        "lora_rank > 8",
        "lora_rank == 16 and lr < 1e-3",  # a control that does not vary
        "use_rslora == false and lora_rank != 8",  # one that is omitted at its default
        "name == 'lora_rank=16'",
        "lora_rank >= 16 and mode == 'B1' and model_format == 'adapter' and merge_adapters == true",
        "lora_rank >= 16 and trainer == 'torchtune' and base == 'full' and system_prompt == null",
    ],
)
def test_a_condition_may_ask_for_every_setting_and_for_the_name(when: str) -> None:
    assert choose(when, variables=RANKS) == {"lora_rank=8": ["all"], "lora_rank=16": [*NAMES]}


def test_a_runs_own_tasks_stand_whatever_the_condition_says() -> None:
    runs = [
        {"name": "control"},
        {"name": "first", "seed": 1, "tasks": ["some"]},
        {"name": "kept", "seed": 2, "tasks": []},
    ]
    assert choose("name == 'control'", runs=runs) == {"control": [*NAMES], "first": ["some"]}


def test_the_order_of_a_runs_tasks_is_that_of_the_file() -> None:
    runs = [{"name": "a", "tasks": ["some", "all"]}, {"name": "b", "seed": 1, "tasks": ["all", "some"]}]
    assert choose(runs=runs) == {"a": [*NAMES], "b": [*NAMES]}


def test_training_alone_asks_for_no_task() -> None:
    assert choose("lora_rank == 4", variables=RANKS, evaluation={"enabled": False}).keys() == {
        "lora_rank=8",
        "lora_rank=16",
    }


def test_a_point_that_no_task_is_for_is_kept_and_not_evaluated() -> None:
    tasks = [{"task": "package/all", "when": "lora_rank == 8"}]
    assert choose(variables=RANKS, evaluation={"tasks": tasks}) == {"lora_rank=8": ["all"]}


def test_an_earlier_epoch_has_its_own_number_and_the_name_of_its_point() -> None:
    sections: dict[str, Any] = {"runs": [{"name": "x"}], "controls": {"epochs": 3}}
    sections["evaluation"] = {"epochs": "all"}
    assert choose("epoch == epochs", **sections)["x"] == [*NAMES]
    assert choose("epoch == epochs", **sections)["x__epoch=1"] == ["all"]
    assert choose("name == 'x' and epoch > 1", **sections)["x__epoch=2"] == [*NAMES]


def test_a_condition_on_a_training_setting_does_not_hold_for_an_adapter_that_exists(tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).touch()
    runs = [{"name": "theirs", "adapter": str(tmp_path)}]
    assert choose("lora_rank < 9", variables=RANKS, runs=runs)["theirs"] == ["all"]
    assert choose("mode == 'B1'", variables=RANKS, runs=runs)["theirs"] == [*NAMES]
    assert choose("system_prompt == null", variables=RANKS, runs=runs)["theirs"] == [*NAMES]
    sizes = {"variables": {"max_samples": [100, 1000]}, "runs": runs}
    assert choose("max_samples > 500", **sizes)["theirs"] == ["all"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"when": "lora_rank == 4"}, "evaluation.tasks.1: no point is evaluated on 'some': none satisfies 'lora_rank"),
        ({"when": "lora_rnk == 8"}, "evaluation.tasks.1.when: unknown key 'lora_rnk' (did you mean 'lora_rank'?)"),
        (
            {"when": "epoch == 1", "evaluation": {"epochs": "best"}, "data": {"train": "t", "validation": "v"}},
            "evaluation.tasks.1.when: unknown key 'epoch'",
        ),
        ({"when": "lora_rank"}, "evaluation.tasks.1.when: 'lora_rank' is invalid: it is 8, neither true nor false"),
        ({"when": "max_steps_per_epoch > 8"}, "evaluation.tasks.1.when: 'max_steps_per_epoch > 8' is invalid: "),
        (
            {"runs": [{"name": "x", "seed": 1, "tasks": ["som"]}]},
            "runs.0.tasks: no task is named 'som' (did you mean 'some'?). Expected: all, some",
        ),
        ({"runs": [{"name": "x", "seed": 1, "tasks": "some"}]}, "runs.0.tasks: 'some' is invalid. Expected: a list"),
        (
            {"runs": [{"name": "x", "tasks": ["all"]}], "variables": {}},
            "evaluation.tasks.1: no point is evaluated on 'some'. Expected: a task of some point",
        ),
    ],
)
def test_what_chooses_nothing_or_what_is_not_there_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        choose(**{"variables": RANKS} | sections)
    assert message in str(error.value)


def test_baselines_alone_have_every_task_and_no_condition() -> None:
    baselines = {"baselines": [{"name": "other", "model": "m2"}]}
    assert choose(evaluation=baselines) == {}
    with pytest.raises(InputError, match=r"evaluation.tasks.1: no point is evaluated on 'some'"):
        choose("lora_rank == 8", evaluation=baselines)
