"""Which points are evaluated on which tasks: a task's `when` chooses points, a run's `tasks` its tasks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorasweep.experiment.conditions import Condition
from lorasweep.experiment.points import Baseline, Point, get_setting
from lorasweep.experiment.sections import MODE_KEY, PROMPT_KEYS, SETTING_KEYS, Evaluation, Experiment, split_mode
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.util.errors import InputError, nearest

KNOWN_KEYS = (*SETTING_KEYS, "name", "epoch")
"""The keys that a `when` may use."""


def choose_tasks(experiment: Experiment, tasks: Sequence[TaskEntry], points: Mapping[str, Point]) -> dict[str, Point]:
    """Return the points with the names of their tasks. A point that no task is for is kept, but not evaluated.

    Raises:
        InputError: A run names an unknown task, a `when` is no condition, or no point is evaluated on a task.
    """
    names = [task.name for task in tasks]
    places = {task.name: f"evaluation.tasks.{index}" for index, task in enumerate(tasks)}
    # Which epoch is the best, only the training tells.
    known = [key for key in KNOWN_KEYS if key != "epoch" or experiment.evaluation.epochs != "best"]
    conditions = {
        name: Condition(task.when, known, f"{places[name]}.when")
        for name, task in zip(names, experiment.evaluation.tasks, strict=True)
        if task.when is not None
    }
    _check_runs(experiment, names)
    if not conditions and all(point.tasks is None for point in points.values()):
        return dict(points)
    chosen = {name: _choose(point, names, conditions) for name, point in points.items()}
    evaluated = {task for point in chosen.values() if point.is_evaluated for task in list_tasks(names, point)}
    for task in names:
        condition = experiment.evaluation.tasks[names.index(task)].when
        if experiment.evaluation.enabled and task not in evaluated and (points or condition is not None):
            said = f"{places[task]}: no point is evaluated on '{task}'"
            said += "" if condition is None else f": none satisfies {condition!r}"
            raise InputError(said, "a task of some point; see 'when', and 'tasks' of runs")
    return chosen


def list_tasks(names: Iterable[str], point: Point | Baseline) -> list[str]:
    """Return those of the tasks that a point or a baseline is evaluated on.

    A base model has all tasks of its points, so that every score of a point has a gain over it.
    """
    return [name for name in names if point.tasks is None or name in point.tasks]


def with_own_tasks(evaluation: Evaluation, names: Sequence[str], point: Point | Baseline) -> Evaluation:
    """Return the section `evaluation` with the tasks of a point or a baseline alone; `names` are those of all tasks."""
    if point.tasks is None:
        return evaluation
    own = [task for name, task in zip(names, evaluation.tasks, strict=True) if name in point.tasks]
    return evaluation.model_copy(update={"tasks": own})


def _check_runs(experiment: Experiment, names: Sequence[str]) -> None:
    for index, run in enumerate(experiment.runs):
        for task in run.get("tasks") or ():
            if task not in names:
                problem = f"runs.{index}.tasks: no task is named {task!r}{nearest(task, names)}"
                raise InputError(problem, ", ".join(names) or "no tasks")


def _choose(point: Point, names: Sequence[str], conditions: Mapping[str, Condition]) -> Point:
    tasks = point.tasks
    if tasks is None:
        values = _get_values(point)
        tasks = tuple(name for name in names if name not in conditions or _holds(conditions[name], values))
    tasks = tuple(name for name in names if name in tasks)
    is_all = set(tasks) >= set(names)
    return replace(point, tasks=None if is_all else tasks, is_evaluated=point.is_evaluated and bool(tasks))


def _holds(condition: Condition, values: Mapping[str, Any]) -> bool:
    """Whether a condition holds. One on settings that a point has none of, such as an existing adapter, does not."""
    return condition.keys <= values.keys() and condition.holds(values)


def _get_values(point: Point) -> dict[str, Any]:
    """Return what a condition can ask of a point: each key that can vary, with its value."""
    asked = (*PROMPT_KEYS, "format")
    keys = [key for key in SETTING_KEYS if not point.adapter or key in point.settings or key in asked]
    values = {key: get_setting(point.settings, key) for key in keys}
    values |= {key: getattr(point.data, key) for key in keys if hasattr(point.data, key)}
    last = {} if point.adapter else {"epoch": point.epoch or point.controls.epochs}
    return {
        **values,
        **split_mode(point.mode),
        MODE_KEY: point.mode,
        "base": point.base,
        "name": point.trained_name,
        **last,
    }
