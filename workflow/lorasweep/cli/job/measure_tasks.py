"""Load tasks with their solvers and scorers, and print as JSON what is known of each without evaluating it.

That is its number of samples, the mean size of their prompts, the keys of metadata that all samples have, the names of
its metrics, a score that two scorers give, where it brings a system message, and how many samples' inputs it shares
with other tasks; or why it does not load.
"""

import argparse
import contextlib
import json
import os
import sys
from typing import Any

import tenacity.nap

from lorasweep.evaluation.inspect_tasks import (
    find_shared_score,
    list_scores,
    load_parts,
    name_metrics,
    stand_in_for_models,
)
from lorasweep.evaluation.spec import TaskSpec
from lorasweep.evaluation.system_messages import find_system_message
from lorasweep.util.errors import describe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", required=True, help="JSON: a list of TaskSpecs")
    parser.add_argument("--roles", nargs="*", default=[], help="the roles that have a model")


def run(arguments: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):  # of the tasks' own code
        stand_in_for_models(arguments.roles)
        if os.environ.get("HF_HUB_OFFLINE") != "0":
            # Inspect waits for minutes before it asks the hub again.
            tenacity.nap.sleep = lambda seconds: None
        tasks = [TaskSpec.model_validate(entry) for entry in json.loads(arguments.tasks)]
        inputs: dict[str, set[str]] = {}
        measured = {task.name: _measure(task, inputs) for task in tasks}
        for name, own in inputs.items():
            shared = {other: len(own & theirs) for other, theirs in inputs.items() if other != name and own & theirs}
            measured[name] |= {"shared": shared} if shared else {}
    print(json.dumps(measured))


def _measure(spec: TaskSpec, inputs: dict[str, set[str]]) -> dict[str, Any]:
    """Return what is known of a task, and add its samples' inputs to `inputs`."""
    try:
        task = load_parts(spec)
        samples = list(task.dataset)[: spec.limit]
        texts = [get_text(sample.input) for sample in samples]
        keys = [{k for k, value in (sample.metadata or {}).items() if value is not None} for sample in samples]
        system_message, metrics = find_system_message(task, spec.limit), name_metrics(task)
        shared_score = find_shared_score(list_scores(task))
    except (Exception, SystemExit) as error:
        token = os.environ.get("HF_TOKEN")  # in `lorasweep download` alone
        return {"error": describe(error).replace(token, "***") if token else describe(error)}
    inputs[spec.name] = set(texts)
    return {
        "samples": len(texts) * (spec.epochs or task.epochs or 1),
        "prompt_bytes": sum(len(text.encode()) for text in texts) / max(1, len(texts)),
        "metadata": sorted(set.intersection(*keys) if keys else []),
        "some_metadata": sorted(set.union(*keys) if keys else []),
        "metrics": metrics,
        "shared_score": shared_score,
        "system_message": system_message,
    }


def get_text(messages: Any) -> str:
    """Return the text of a prompt, which is a string or a list of messages."""
    return messages if isinstance(messages, str) else "".join(str(message.text) for message in messages)
