"""Print how many samples tasks have and how long their prompts are, as JSON: nothing is evaluated."""

import argparse
import json
import sys
from typing import Any

from inspect_ai._eval.loader import load_tasks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", required=True, help="JSON: a list of name, task, args, limit and epochs")


def run(arguments: argparse.Namespace) -> None:
    measured = {}
    for given in json.loads(arguments.tasks):
        (task,) = load_tasks([given["task"]], given["args"])
        samples = list(task.dataset)[: given["limit"]]
        sizes = [len(get_text(sample.input).encode()) for sample in samples]
        epochs = given["epochs"] or task.epochs or 1
        measured[given["name"]] = {"samples": len(samples) * epochs, "prompt_bytes": sum(sizes) / max(1, len(sizes))}
    json.dump(measured, sys.stdout)


def get_text(messages: Any) -> str:
    """A prompt is text, or a list of messages."""
    return messages if isinstance(messages, str) else "".join(str(message.text) for message in messages)
