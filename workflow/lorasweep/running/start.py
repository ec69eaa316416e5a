"""Look before the first job at what the jobs will need: whether tasks load, and what recipes name can be built.

What was found is stored by the digests of what was looked at. A run looks again at what failed before.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasweep.evaluation.system_messages import refuse_system_message
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.planning import counting
from lorasweep.stages import TASK_RULES
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import InputError, nearest

JOB = ("-m", "lorasweep", "job")
"""Arguments to Python that precede the name of a job."""


def look(sweep: Sweep, root: Path, rules: Collection[str], environments: Mapping[str, Path]) -> None:
    """Look at what jobs of these rules need, unless it is known to be well; `find_faults` tells what was found.

    `root` is the clone. `environments` are folders of conda environments by stage, in place of those in the clone.

    Raises:
        InputError: something could not be looked at.
    """
    run = str(root / "scripts/run")
    if _evaluates(sweep, rules) and (not counting.read_tasks(*_get_tasks(sweep)) or _find_task_errors(sweep)):
        command = [run, sweep.evaluation_stage, *JOB, "measure_tasks"]
        counting.load_tasks(*_get_tasks(sweep), command, get_variables(environments, sweep.evaluation_stage))
    if _trains(sweep, rules) and _find_recipe_faults(sweep) != []:
        counting.build_recipes(sweep.results, _get_recipes(sweep), make_trainer_command(sweep, root, environments))


def find_faults(sweep: Sweep, rules: Collection[str]) -> InputError | None:
    """Return what is known to be wrong for jobs of these rules; `None` if there is nothing."""
    faults = []
    if _evaluates(sweep, rules):
        faults += _find_task_errors(sweep) or [
            *_find_system_messages(sweep),
            *_find_shared_scores(sweep),
            *_find_metric_faults(sweep),
            *_find_cluster_fault(sweep),
        ]
    if _trains(sweep, rules):
        faults += _find_recipe_faults(sweep) or []
    error = InputError.join(faults)
    error.put_under(sweep.source)
    return error if faults else None


def _evaluates(sweep: Sweep, rules: Collection[str]) -> bool:
    return any(rule in rules for rule in TASK_RULES if rule != "prune" or sweep.pruning_task)


def _trains(sweep: Sweep, rules: Collection[str]) -> bool:
    return not sweep.missing_model and bool(sweep.trained) and "train" in rules


def make_trainer_command(sweep: Sweep, root: Path, environments: Mapping[str, Path]) -> counting.TrainerCommand:
    """Return what makes commands in the environments of the sweep's trainers; the arguments are those of `look`."""

    def make(trainer: str, job: str, *arguments: str) -> tuple[Sequence[str], Mapping[str, str]]:
        stage = sweep.trainers[trainer]
        command = [str(root / "scripts/run"), stage, *JOB, job, *arguments, "--trainer", trainer]
        return command, get_variables(environments, stage)

    return make


def get_variables(environments: Mapping[str, Path], stage: str) -> dict[str, str]:
    """Return the environment variables of a command in a stage's environment.

    With conda, its Python is the first on the path.
    """
    folders = [f"{environments[stage]}/bin"] if stage in environments else []
    return {**os.environ, "PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}


def _get_tasks(sweep: Sweep) -> tuple[Path, Sequence[TaskEntry], list[Path], Collection[str]]:
    return sweep.results, sweep.all_tasks, list(map(Path, sweep.task_files)), sweep.experiment.evaluation.model_roles


def _find_task_errors(sweep: Sweep) -> list[InputError]:
    return list_errors(sweep.all_tasks, counting.read_tasks(*_get_tasks(sweep)), sweep.source)


def list_errors(tasks: Sequence[TaskEntry], found: Mapping[str, Mapping[str, Any]], source: str) -> list[InputError]:
    """Return an error for each task that did not load; `found` is what is known of tasks by name."""
    return [
        InputError(
            f"{entry.place}: {entry.spec.task!r} does not load: {found[entry.name]['error']}",
            f"a task that loads without the network; 'lorasweep download {source}' fetches what it needs of the hub",
        )
        for entry in tasks
        if "error" in found.get(entry.name, {})
    ]


def _find_system_messages(sweep: Sweep) -> list[InputError]:
    """Return an error for each task that brings a system message, unless its entry says which message stands."""
    found = counting.read_tasks(*_get_tasks(sweep))
    undecided = [entry for entry in sweep.all_tasks if entry.spec.system_prompt is None and entry.name in found]
    return [
        refuse_system_message(entry.name, place, entry.place if entry is sweep.choosing_task else "evaluation.tasks")
        for entry in undecided
        if (place := found[entry.name].get("system_message"))
    ]


def _find_shared_scores(sweep: Sweep) -> list[InputError]:
    found = counting.read_tasks(*_get_tasks(sweep))
    return [
        InputError(f"{entry.place}: '{entry.name}': {shared}", "scorers whose scores have different names")
        for entry in sweep.all_tasks
        if (shared := found.get(entry.name, {}).get("shared_score"))
    ]


def note_shared_samples(sweep: Sweep) -> list[str]:
    """Return a note on each task that is known to have samples by which an epoch, or what goes on, is chosen."""
    choosing = sweep.choosing_task
    if choosing is None:
        return []
    known = counting.read_tasks(*_get_tasks(sweep)).get(choosing.name, {})
    chosen = "an epoch that they chose" if sweep.validation else "points that they chose"
    return [
        f"{choosing.place}: shares the inputs of {count} samples with the task '{task}', whose scores will be "
        f"too good: they judge {chosen}."
        for task, count in known.get("shared", {}).items()
        if sweep.experiment.evaluation.enabled
    ]


def _find_metric_faults(sweep: Sweep) -> list[InputError]:
    wanted = [("report", sweep.experiment.report.metric, next(iter(sweep.deciding_tasks), None))]
    chosen = sweep.experiment.evaluation.validation_task or (sweep.experiment.prune and sweep.experiment.prune.task)
    if sweep.choosing_task and chosen:
        wanted.append((sweep.choosing_task.place, chosen.metric, sweep.choosing_task.name))
    found, faults = counting.read_tasks(*_get_tasks(sweep)), []
    for place, metric, task in wanted:
        known = found.get(str(task), {}).get("metrics")
        if metric is not None and known and metric not in known:
            problem = f"{place}.metric: {metric!r} is no metric of the task '{task}'{nearest(metric, known)}"
            faults.append(InputError(problem, ", ".join(known)))
    return faults


def _find_cluster_fault(sweep: Sweep) -> list[InputError]:
    cluster, known = sweep.experiment.report.cluster, counting.read_tasks(*_get_tasks(sweep))
    found = {name: known[name] for name in sweep.deciding_tasks if name in known}
    keys = sorted({key for measured in found.values() for key in measured.get("metadata", [])})
    if cluster is None or not found:
        return []
    for task, measured in found.items():
        if cluster in measured.get("some_metadata", []) and cluster not in measured.get("metadata", []):
            problem = f"report.cluster: {cluster!r} is in the metadata of some samples of the task '{task}' only"
            return [InputError(problem, "a key that all samples of a task have, or none")]
    if cluster in keys:
        return []
    problem = f"report.cluster: {cluster!r} is no key that all samples of a task have in their metadata"
    return [InputError(f"{problem}{nearest(cluster, keys)}", ", ".join(keys) or "null, as no task has such a key")]


def _get_recipes(sweep: Sweep) -> dict[str, dict[str, str]]:
    """Return the texts of recipes by trainer and by training."""
    recipes: dict[str, dict[str, str]] = {trainer: {} for trainer in sweep.trainers}
    for training in sweep.trainings:
        recipes[sweep.get_trainer(training)][training] = sweep.get_recipe(training)
    return recipes


def _find_recipe_faults(sweep: Sweep) -> list[InputError] | None:
    """Return the stored faults of the recipes, each once; `None` if none are stored of these recipes."""
    found = counting.read_recipe_faults(sweep.results, _get_recipes(sweep))
    if found is None:
        return None
    points: dict[tuple[str, str], list[str]] = {}
    for training, part, reason in found:
        points.setdefault((part, reason), []).append(sweep.trainings[training])
    return [_explain(sweep, part, reason, names) for (part, reason), names in points.items()]


def _explain(sweep: Sweep, part: str, reason: str, points: Sequence[str]) -> InputError:
    others = f" and {len(points) - 1} others" if len(points) > 1 else ""
    where, expected = f"the recipe's '{part}'", ""
    if part in sweep.points[points[0]].controls.override:
        where = f"controls._override.{part}"
        expected = "arguments of its _component_; null removes one that the workflow sets"
    return InputError(f"{where} (point '{points[0]}'{others}) cannot be built: {reason}", expected)
