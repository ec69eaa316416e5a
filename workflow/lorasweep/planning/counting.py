"""Count the workload for the plan: training tokens with the trainer, evaluation samples with Inspect.

With the samples, Inspect tells which tasks bring a system message of their own.

Counting takes seconds and needs environments that Snakemake's process lacks. So `lorasweep plan` counts and stores the
figures in the experiment's folder, and a dry run reads them there.
"""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.evaluation.system_messages import refuse_system_message
from lorasweep.experiment.sections import DATA_KEYS, Data
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.experiment.training_data import check_data
from lorasweep.layout import LENGTHS, TASK_SIZES
from lorasweep.planning.costs import TEMPLATE_TOKENS, TaskSize
from lorasweep.planning.lengths import BYTES_PER_TOKEN, Lengths
from lorasweep.trainers import DEFAULT_TRAINER
from lorasweep.util.digest import digest_file, digest_files
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_aside, write_record


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


def read_count(results: Path, data: Data, fingerprint: str, trainer: str = DEFAULT_TRAINER) -> Count | None:
    """Return what is on record of this data for this base model and trainer; `None` if not counted yet."""
    content = find_record(results / LENGTHS).get("counts", [])
    key = _get_lengths_key(data, fingerprint, trainer)
    found = next((entry for entry in content if entry["key"] == key), None)
    if found is None:
        return None
    lengths = {name: Lengths.count(data, parts) for name, parts in found.get("parts", {}).items()}
    return Count(lengths.get("train"), lengths.get("validation"), found.get("refused", ""))


def count_lengths(
    results: Path,
    recipes: Mapping[Data, str],
    fingerprint: str,
    command: Sequence[str],
    trainer: str = DEFAULT_TRAINER,
) -> None:
    """Have the trainer count the tokens of all samples, and store the counts. What is on record stays.

    `recipes` has, for each data section of a training, the text of a recipe. `command` starts `lorasweep job
    measure_lengths` in the trainer's environment.

    Raises:
        InputError: the command failed.
    """
    counted = {json.dumps(entry["key"]): entry for entry in find_record(results / LENGTHS).get("counts", [])}
    counts = []
    for data, recipe in recipes.items():
        key = _get_lengths_key(data, fingerprint, trainer)
        entry = counted.get(json.dumps(key))
        if entry is None:
            with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
                file.write(recipe)
                file.flush()
                entry = {"key": key, **_run([*command, "--recipe", file.name, "--trainer", trainer])}
        counts.append(entry)
    results.mkdir(parents=True, exist_ok=True)
    # Not `write_record`, which puts each of a million numbers in a line of its own.
    write_aside(results / LENGTHS, json.dumps({"counts": counts}) + "\n")


def read_task_sizes(results: Path, tasks: Sequence[TaskEntry], files: Sequence[Path]) -> dict[str, TaskSize]:
    """Return the stored sizes of tasks by name; empty if they were not counted, or a task has changed since.

    `files` are the tasks' source files.
    """
    content = find_record(results / TASK_SIZES)
    if content.get("key") != _get_task_key(tasks, files):
        return {}
    return {
        entry.name: TaskSize(
            content["tasks"][entry.name]["samples"],
            TEMPLATE_TOKENS + content["tasks"][entry.name]["prompt_bytes"] / BYTES_PER_TOKEN,
            entry.spec.max_tokens,
        )
        for entry in tasks
    }


def count_task_sizes(results: Path, tasks: Sequence[TaskEntry], files: Sequence[Path], command: Sequence[str]) -> None:
    """Have Inspect count the samples of tasks, and store the sizes.

    `command` starts `lorasweep job measure_tasks` in Inspect's environment.

    Raises:
        InputError: the command failed.
    """
    requests = [{"name": entry.name, **_get_request(entry)} for entry in tasks]
    sizes = _run([*command, "--tasks", json.dumps(requests)])
    write_record(results / TASK_SIZES, {"key": _get_task_key(tasks, files), "tasks": sizes})


def check_system_messages(results: Path, tasks: Sequence[TaskEntry], files: Sequence[Path]) -> None:
    """Check that no counted task brings a system message of its own, unless its entry says which one stands.

    Raises:
        InputError: a task does.
    """
    content = find_record(results / TASK_SIZES)
    if content.get("key") != _get_task_key(tasks, files):
        return
    places = {e.name: content["tasks"][e.name]["system_message"] for e in tasks if e.spec.system_prompt is None}
    if errors := [refuse_system_message(name, place) for name, place in places.items() if place]:
        raise InputError.join(errors)


def _run(command: Sequence[str]) -> Any:
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if result.returncode:
        errors = result.stderr.strip().splitlines()
        raise InputError(f"{command[5]} failed: {errors[-1] if errors else 'no error output'}")
    return json.loads(result.stdout.splitlines()[-1])


def _get_lengths_key(data: Data, fingerprint: str, trainer: str) -> list[str]:
    settings = data.model_dump_json(exclude={*DATA_KEYS, "too_long"})
    return [*(digest_files(data.get_files(key)) for key in DATA_KEYS), settings, fingerprint, trainer]


def _get_task_key(tasks: Sequence[TaskEntry], files: Sequence[Path]) -> list[Any]:
    return [[_get_request(entry) for entry in tasks], [digest_file(file) for file in files]]


def _get_request(entry: TaskEntry) -> dict[str, Any]:
    """Return the settings that determine a task's number of answers, and its prompts as the task makes them."""
    return entry.spec.model_dump(mode="json", include={"task", "args", "limit", "epochs", "solver", "solver_args"})
