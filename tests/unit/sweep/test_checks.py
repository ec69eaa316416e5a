"""Tasks: what is accepted, and where messages point."""

import re
import sys
from pathlib import Path

import pytest

from lorasweep.experiment.sections import Evaluation, Task
from lorasweep.experiment.tasks import get_tasks, get_validation_task
from lorasweep.sweep.checks import check_metric_loggers
from lorasweep.util.errors import InputError

TASKS = """
from inspect_ai import Task, task

@task
def words(size: int = 3): ...

@task(name="other")
def letters(**options): ...

@task
def needs(a, b, *, c, d=1): ...

@solver
def think(steps: int = 1): ...

def helper(): ...
"""


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.py"
    file.write_text(TASKS)
    return file


def test_a_metric_logger_that_is_not_installed_is_refused_with_the_command_that_installs_it() -> None:
    bare = {"trl": [sys.executable, "-I", "-S"]}
    command = re.escape(f"'{sys.executable} -m pip install mlflow-skinny'")
    with pytest.raises(
        InputError, match=f"'mlflow' is not installed for trainer: trl. Expected: no mlflow, or {command}"
    ):
        check_metric_loggers(["disk", "mlflow"], bare)
    check_metric_loggers(["disk", "wandb"], bare)
    with pytest.raises(InputError, match=r"training\.metric_loggers: could not be checked: unknown option"):
        check_metric_loggers(["mlflow"], {"trl": [sys.executable, "--no-such-option"]})


def test_one_that_is_installed_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_metric_loggers(["mlflow"], {"trl": [sys.executable]})


def named(task: str, **keys: object) -> Task:
    return Task.model_validate({"task": task, **keys})


def test_tasks_are_called_as_inspect_calls_them(tasks_file: Path) -> None:
    entries = get_tasks([named(f"{tasks_file}@words", args={"size": 4}), named(f"{tasks_file}@other", args={"any": 1})])
    assert [entry.name for entry in entries] == ["words", "other"]


def test_a_registered_task_is_called_after_its_last_part() -> None:
    [entry] = get_tasks([named("inspect_evals/arc_easy")])
    assert (entry.name, entry.file) == ("arc_easy", None)


@pytest.mark.parametrize(
    ("task", "keys", "said"),
    [
        ("none.py@words", {}, "no such file: none.py"),
        ("{file}@word", {}, "did you mean 'words'"),
        ("{file}@helper", {}, "no task 'helper'"),
        ("{file}", {}, "no single task"),
        ("{file}@letters", {}, "no task 'letters'"),
        ("{file}@words", {"args": {"sise": 1}}, "did you mean 'size'"),
        ("{file}@needs", {"args": {"a": 1}}, "needs b, c, which have no default"),
        ("{file}@words", {"files": ["none.jsonl"]}, "no such file: none.jsonl"),
        ("inspect_evals/arc_easy", {"files": ["none.jsonl"]}, "evaluation.tasks.0.files.0: no such file: none.jsonl"),
        (
            "{file}@words",
            {"solver": "none.py@think"},
            "solver: no such file: none.py. Expected: file.py@solver",
        ),
        ("{file}@words", {"solver": "{file}@thin"}, "no solver 'thin' (did you mean 'think'"),
        ("{file}@words", {"solver": "{file}@words"}, "no solver 'words'"),
        ("{file}@words", {"solver": "{file}@think", "solver_args": {"step": 2}}, "'step' is not an argument"),
        ("{file}@words", {"solver_args": {"steps": 2}}, "solver_args: {'steps': 2} is invalid without 'solver'"),
        ("{file}@words", {"scorer": "{file}@think"}, "no scorer 'think'"),
        ("inspect_evals/arc_easy", {"scorer_args": {"a": 2}}, "is invalid without 'scorer'"),
    ],
)
def test_a_task_that_does_not_exist_is_refused(tasks_file: Path, task: str, keys: dict[str, object], said: str) -> None:
    values = {k: v.format(file=tasks_file) if isinstance(v, str) else v for k, v in keys.items()}
    with pytest.raises(InputError) as error:
        get_tasks([named(task.format(file=tasks_file), **values)])
    assert str(error.value).startswith("evaluation.tasks.0")
    assert said in str(error.value)


def test_a_solver_and_a_scorer_are_found_where_they_are(tasks_file: Path) -> None:
    data = tasks_file.with_name("data.csv")
    data.write_text("a\n")
    [entry] = get_tasks(
        [named("pkg/t", solver=f"{tasks_file}@think", solver_args={"steps": 2}, scorer="match", files=[str(data)])]
    )
    assert entry.files == [str(tasks_file), str(data)]
    assert entry.registered == [("task", "pkg/t"), ("scorer", "match")]


def test_a_task_file_that_is_no_python_is_refused(tasks_file: Path) -> None:
    tasks_file.write_text("def (")
    with pytest.raises(InputError, match=r"tasks\.py:1: not Python"):
        get_tasks([named(f"{tasks_file}@words")])


def test_two_tasks_of_one_name_are_refused(tasks_file: Path) -> None:
    with pytest.raises(InputError, match="two tasks are named 'words'"):
        get_tasks([named(f"{tasks_file}@words"), named(f"{tasks_file}@words", args={"size": 1})])


def choose(tasks: list[Task], task: str, **keys: object) -> str:
    """Return the name of the task that chooses epochs beside tasks whose scores are reported."""
    evaluation = Evaluation.model_validate({"validation_task": {"task": task, **keys}})
    entry = get_validation_task(evaluation, get_tasks(tasks))
    assert entry
    return entry.name


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"args": {"size": 3}},  # the default
        {"limit": 3, "scorer": "includes", "prompt": "Say: {input}"},
    ],
)
def test_a_task_does_not_choose_the_epoch_by_the_samples_that_are_reported(
    tasks_file: Path, keys: dict[str, object]
) -> None:
    words = named(f"{tasks_file}@words")
    with pytest.raises(InputError, match=r"evaluation\.validation_task: .* has the samples of evaluation\.tasks\.0"):
        choose([words], f"{tasks_file}@words", name="dev", **keys)
    with pytest.raises(InputError, match=r"has the samples of evaluation\.tasks\.1 \('arc_easy'\)"):
        choose([words, named("inspect_evals/arc_easy")], "inspect_evals/arc_easy", name="dev")
    assert choose([words], f"{tasks_file}@words", name="dev", args={"size": 4}) == "dev"


def test_a_task_that_chooses_the_epoch_is_checked_as_others_and_has_a_name_of_its_own(tasks_file: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation\.validation_task\.args: 'sise' is not an argument"):
        choose([], f"{tasks_file}@words", args={"sise": 1})
    with pytest.raises(InputError, match=r"evaluation\.tasks\.0 is named 'words' too. Expected: .* dev_words"):
        choose([named(f"{tasks_file}@words")], f"{tasks_file}@words", args={"size": 1})
    assert get_validation_task(Evaluation(), []) is None
