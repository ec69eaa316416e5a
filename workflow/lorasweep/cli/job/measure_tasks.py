"""Print the number of samples of tasks, the mean size of their prompts and where they bring a system message, as JSON.

No task is evaluated.
"""

import argparse
import json
import sys
from typing import Any

from inspect_ai._eval.loader import load_tasks, solver_from_spec
from inspect_ai.solver import SolverSpec

from lorasweep.evaluation.system_messages import find_system_message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", required=True, help="JSON: a list of name and the experiment's keys of each task")


def run(arguments: argparse.Namespace) -> None:
    measured = {}
    for entry in json.loads(arguments.tasks):
        (task,) = load_tasks([entry["task"]], entry["args"])
        samples = list(task.dataset)[: entry["limit"]]
        sizes = [len(get_text(sample.input).encode()) for sample in samples]
        epochs = entry["epochs"] or task.epochs or 1
        if entry["solver"]:
            task.solver = solver_from_spec(SolverSpec(entry["solver"], entry["solver_args"], entry["solver_args"]))
        measured[entry["name"]] = {
            "samples": len(samples) * epochs,
            "prompt_bytes": sum(sizes) / max(1, len(sizes)),
            "system_message": find_system_message(task, entry["limit"]),
        }
    json.dump(measured, sys.stdout)


def get_text(messages: Any) -> str:
    """Return the text of a prompt, which is a string or a list of messages."""
    return messages if isinstance(messages, str) else "".join(str(message.text) for message in messages)
