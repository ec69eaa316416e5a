"""Count the workload for the plan: training tokens with the trainer, evaluation samples with Inspect.

With the samples, Inspect tells which tasks bring a system message of their own.

Counting takes seconds and needs environments that Snakemake's process lacks. So `lorasweep plan` counts and stores the
figures in the experiment's folder, and a dry run reads them there.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

from lorasweep.checkpoints.chat_template import find_given_template
from lorasweep.evaluation.spec import make_task_spec
from lorasweep.experiment.sections import DATA_KEYS, DEFAULT_TRAINER, Data, Model
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.experiment.training_data import check_data
from lorasweep.layout import LENGTHS, RECIPES, TASK_SIZES
from lorasweep.planning.costs import PROMPT_TOKENS, TASK_SAMPLES, TEMPLATE_TOKENS, TaskSize
from lorasweep.planning.lengths import BYTES_PER_TOKEN, Lengths
from lorasweep.trainers import OWN_TRAINERS, get_trainer
from lorasweep.util.digest import digest_file, digest_files, digest_text
from lorasweep.util.files import find_record, write_aside, write_record
from lorasweep.util.jobs import ask
from lorasweep.util.versions import digest_packages

Recipes = Mapping[str, Mapping[str, str]]
"""The texts of recipes by trainer and by training."""

TrainerCommand = Callable[..., tuple[Sequence[str], Mapping[str, str]]]
"""Makes the command of a job in a trainer's environment, and its environment variables, of the trainer's name, the name
of the job and the job's arguments."""


class Samples(NamedTuple):
    """The samples of a training, as its trainer tokenizes them."""

    data: Data
    model: Model
    """The base model, whose chat template can be replaced."""
    fingerprint: str
    """Its fingerprint."""
    trainer: str = DEFAULT_TRAINER


@dataclass(frozen=True)
class Count:
    """What the trainer counted of the samples with some prompts."""

    train: Lengths | None
    validation: Lengths | None = None
    refused: str = ""
    """Why a sample cannot be tokenized, with its place; empty if all can."""


def guess_lengths(data: Data) -> Lengths:
    """Return the mean length of training samples in tokens, estimated from the size of their text."""
    size = check_data(data)
    return Lengths.guess(data, size.samples, size.size)


def read_count(results: Path, samples: Samples) -> Count | None:
    """Return what is on record of these samples; `None` if they were not counted yet."""
    content = find_record(results / LENGTHS).get("counts", [])
    data = samples.data
    found = _find_count(content, data, _get_lengths_key(samples))
    if found is None:
        return None
    most = {"train": data.max_samples}
    lengths = {name: Lengths.count(data, parts[: most.get(name)]) for name, parts in found.get("parts", {}).items()}
    return Count(lengths.get("train"), lengths.get("validation"), found.get("refused", ""))


def count_lengths(
    results: Path,
    recipes: Mapping[Samples, str],
    command: TrainerCommand,
) -> None:
    """Have the trainers count the tokens of all samples, and store the counts. What is on record stays.

    `recipes` has the text of a recipe that trains on these samples.

    Raises:
        InputError: the command failed.
    """
    counted = find_record(results / LENGTHS).get("counts", [])
    counts: list[dict[str, Any]] = []
    # The most samples first: their counts are those of fewer too.
    for samples in sorted(recipes, key=lambda each: each.data.max_samples or math.inf, reverse=True):
        data, trainer = samples.data, samples.trainer
        key = _get_lengths_key(samples)
        entry = _find_count([*counts, *counted], data, key)
        if entry is None:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
                file.write(recipes[samples])
                file.flush()
                measured = ask(*command(trainer, "measure_lengths", "--recipe", file.name))
            entry = {"key": key, "max_samples": data.max_samples, **measured}
        if entry not in counts:
            counts.append(entry)
    results.mkdir(parents=True, exist_ok=True)
    # Not `write_record`, which puts each of a million numbers in a line of its own.
    write_aside(results / LENGTHS, json.dumps({"counts": counts}) + "\n")


def read_task_sizes(
    results: Path, tasks: Sequence[TaskEntry], files: Sequence[Path], roles: Iterable[str] = ()
) -> dict[str, TaskSize]:
    """Return the stored sizes of tasks by name; empty if they were not counted, or a task has changed since.

    `files` are the tasks' source files, and `roles` those that have a model.
    """
    found = read_tasks(results, tasks, files, roles)
    if any("error" in measured for measured in found.values()):
        return {}
    return {
        entry.name: TaskSize(
            found[entry.name]["samples"],
            TEMPLATE_TOKENS + found[entry.name]["prompt_bytes"] / BYTES_PER_TOKEN,
            entry.spec.max_tokens,
        )
        for entry in (tasks if found else ())
    }


def guess_task_sizes(tasks: Iterable[TaskEntry]) -> dict[str, TaskSize]:
    """Return the sizes of tasks that were not counted, by name: from their entries in the experiment."""
    return {
        entry.name: TaskSize(
            (entry.spec.limit or TASK_SAMPLES) * (entry.spec.epochs or 1), PROMPT_TOKENS, entry.spec.max_tokens
        )
        for entry in tasks
    }


def read_tasks(
    results: Path, tasks: Sequence[TaskEntry], files: Sequence[Path], roles: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Return what `load_tasks` stored of each task, by name; empty if that is nothing, or a task has changed since."""
    content = find_record(results / TASK_SIZES)
    return dict(content["tasks"]) if content and content["key"] == _get_task_key(tasks, files, roles) else {}


def digest_tasks(tasks: Sequence[TaskEntry], files: Sequence[Path], roles: Iterable[str]) -> str:
    """Return a digest of all that decides what tasks load."""
    return hashlib.sha256(json.dumps(_get_task_key(tasks, files, roles)).encode()).hexdigest()


def load_tasks(
    results: Path,
    tasks: Sequence[TaskEntry],
    files: Sequence[Path],
    roles: Iterable[str],
    command: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Have Inspect load tasks with their solvers and scorers; store their sizes and metrics, or why one does not load.

    `command` starts `lorasweep job measure_tasks` in Inspect's environment.

    Raises:
        InputError: the command failed.
    """
    key = _get_task_key(tasks, files, roles)
    found = ask([*command, "--tasks", json.dumps(key["tasks"]), "--roles", *key["roles"]], environment)
    write_record(results / TASK_SIZES, {"key": key, "tasks": found})


def read_recipe_faults(results: Path, recipes: Recipes) -> list[list[str]] | None:
    """Return what `build_recipes` stored: lists of a training, a part of its recipe and why that cannot be built.

    `None` if nothing is stored of these recipes.
    """
    content = find_record(results / RECIPES)
    return list(content["faults"]) if content and content["key"] == _get_recipes_key(recipes) else None


def build_recipes(results: Path, recipes: Recipes, command: TrainerCommand) -> None:
    """Have the trainers build what recipes name, as far as that needs no weights, and store what cannot be built.

    Raises:
        InputError: the command failed.
    """
    faults = []
    for trainer, texts in recipes.items():
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(texts, file)
            file.flush()
            faults += ask(*command(trainer, "check_recipes", "--recipes", file.name))
    write_record(results / RECIPES, {"key": _get_recipes_key(recipes), "faults": faults})


def _find_count(entries: Iterable[Mapping[str, Any]], data: Data, key: list[str]) -> Any:
    """Return the entry of this data, or of more samples of it; `None` if there is none."""
    alike = [entry for entry in entries if entry["key"] == key]
    for entry in alike:
        if entry["max_samples"] == data.max_samples:
            return entry
    for entry in alike:
        most = entry["max_samples"]
        if not data.max_samples or data.max_samples > (most or math.inf):
            continue
        counted = len(entry.get("parts", {}).get("train", ()))
        # A dataset component of the user's may have other samples than the files.
        if counted == check_data(data.model_copy(update={"max_samples": most})).samples:
            return entry
    return None


def _get_lengths_key(samples: Samples) -> list[str]:
    data, trainer = samples.data, samples.trainer
    settings = data.model_dump_json(exclude={*DATA_KEYS, "too_long", "max_samples"})
    module = Path(str(cast(ModuleType, get_trainer(trainer)).__file__))
    code = sorted(module.parent.glob("*.py")) if module.name == "__init__.py" else [module]
    code += sorted(module.parents[1].glob("*.py")) if trainer in OWN_TRAINERS else []
    files = [digest_files(data.get_files(key)) for key in DATA_KEYS]
    given = find_given_template(samples.model, data)
    template = [] if given is None else [digest_text(given)]
    return [*files, settings, samples.fingerprint, digest_packages(), digest_files(code), trainer, *template]


def _get_task_key(tasks: Sequence[TaskEntry], files: Sequence[Path], roles: Iterable[str]) -> dict[str, Any]:
    return {
        "tasks": [make_task_spec(entry).model_dump(mode="json") for entry in tasks],
        "files": [digest_file(file) for file in files],
        "roles": sorted(roles),
        "packages": digest_packages(),
    }


def _get_recipes_key(recipes: Recipes) -> str:
    content = [[(trainer, sorted(texts.items())) for trainer, texts in sorted(recipes.items())], digest_packages()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
