"""Count the workload for the plan: training tokens with the trainer, evaluation samples with Inspect.

With the samples, Inspect tells which tasks bring a system message of their own.

Counting takes seconds and needs environments that Snakemake's process lacks. So `lorasweep plan` counts and stores the
figures in the experiment's folder, and a dry run reads them there.
"""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from lorasweep.evaluation.system_messages import refuse_system_message
from lorasweep.experiment.sections import Data
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.layout import LENGTHS, TASK_SIZES
from lorasweep.planning.costs import BYTES_PER_TOKEN, TEMPLATE_TOKENS, Lengths, TaskSize
from lorasweep.trainers import DEFAULT_TRAINER
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_record

MOST_SAMPLES = 1000
"""The most training samples whose tokens are counted, evenly spaced over the file."""


def guess_lengths(data: Data, samples: int) -> Lengths:
    """Return the mean length of training samples in tokens, estimated from the size of their file."""
    size = 0
    if data.train and samples:
        size = Path(data.train).stat().st_size
        if data.max_samples:
            with Path(data.train).open("rb") as file:
                size = sum(map(len, islice(file, samples)))
    return Lengths(samples, (size / BYTES_PER_TOKEN / max(1, samples),), are_counted=False)


def read_lengths(
    results: Path, data: Data, fingerprint: str, samples: int, trainer: str = DEFAULT_TRAINER
) -> Lengths | None:
    """Return the stored token lengths of this data for this base model and trainer; `None` if not counted yet."""
    content = find_record(results / LENGTHS)
    if not samples or content.get("key") != _get_lengths_key(data, fingerprint, trainer):
        return None
    return Lengths(samples, tuple(content["lengths"]), are_counted=True)


def count_lengths(
    results: Path, data: Data, fingerprint: str, recipe: str, command: Sequence[str], trainer: str = DEFAULT_TRAINER
) -> None:
    """Have the trainer count the tokens of training samples, and store the lengths.

    `recipe` is the text of any recipe for this data. `command` starts `lorasweep job measure_lengths` in the trainer's
    environment.

    Raises:
        InputError: the command failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(recipe)
        file.flush()
        lengths = _run([*command, "--recipe", file.name, "--most", str(MOST_SAMPLES), "--trainer", trainer])
    write_record(results / LENGTHS, {"key": _get_lengths_key(data, fingerprint, trainer), "lengths": lengths})


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
    settings = data.model_dump_json(exclude={"train", "validation"})
    trainers = [trainer] if trainer != DEFAULT_TRAINER else []
    return [digest_file(Path(str(data.train))), settings, fingerprint, *trainers]


def _get_task_key(tasks: Sequence[TaskEntry], files: Sequence[Path]) -> list[Any]:
    return [[_get_request(entry) for entry in tasks], [digest_file(file) for file in files]]


def _get_request(entry: TaskEntry) -> dict[str, Any]:
    """Return the settings that determine a task's number of answers, and its prompts as the task makes them."""
    return entry.spec.model_dump(mode="json", include={"task", "args", "limit", "epochs", "solver", "solver_args"})
