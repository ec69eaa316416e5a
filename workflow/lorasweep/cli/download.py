"""Download what an experiment names on the Hugging Face hub, models and data sets, and what its tasks load from there.

Models and data sets are pinned to commits. A run itself downloads nothing. It is refused until these files are present.
"""

import argparse
import os
import shutil
from pathlib import Path

from lorasweep.cli.experiments import add_experiment
from lorasweep.experiment.loading import load_experiment, read_config
from lorasweep.experiment.sections import Experiment
from lorasweep.experiment.tasks import get_pruning_task, get_tasks, get_validation_task
from lorasweep.hub import references as hub
from lorasweep.layout import REVISIONS
from lorasweep.planning import counting
from lorasweep.running.start import JOB, list_errors
from lorasweep.sweep.sweep import RESULTS
from lorasweep.util.errors import InputError, naming_file
from lorasweep.util.files import hold_alone

ROOT = Path(__file__).parents[3]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would be downloaded, and download nothing")


def run(arguments: argparse.Namespace) -> None:
    source = str(arguments.experiment)
    experiment = load_experiment(read_config(arguments.experiment), source)
    references = hub.find_references(experiment)
    record = RESULTS / experiment.experiment.name / REVISIONS
    with naming_file(source):
        if not references:
            print(f"{source} names nothing on the hub.")
        elif arguments.dry_run:
            print(hub.describe_missing(references, record) or "Everything is downloaded.")
        else:
            hub.fetch(references, record)
            revisions = hub.read_revisions(record)
            print("Fetched:", *sorted({str(hub.pin(reference, revisions).path) for reference in references.values()}))
        evaluation = experiment.evaluation
        chooses = evaluation.validation_task or (experiment.prune and experiment.prune.task)
        if (evaluation.enabled and evaluation.tasks) or chooses:
            _fetch_for_tasks(experiment, source, is_dry_run=arguments.dry_run)


def _fetch_for_tasks(experiment: Experiment, source: str, *, is_dry_run: bool) -> None:
    """Load the tasks with access to the hub, so that its caches in the working directory have all that they need.

    Raises:
        InputError: a task does not load.
    """
    evaluation, results = experiment.evaluation, RESULTS / experiment.experiment.name
    tasks = get_tasks(evaluation.tasks)
    choosing = (get_validation_task(evaluation, tasks), get_pruning_task(experiment.prune, tasks))
    tasks += [entry for entry in choosing if entry]
    files = sorted({Path(file) for entry in tasks for file in entry.files})
    names = ", ".join(entry.name for entry in tasks)
    stage = "vllm" if evaluation.backend == "vllm" else "eval"
    if not (ROOT / ".venv" / stage / "installed").exists():
        print(f"The tasks are not loaded, since .venv/{stage} is missing (make install): {names}")
        return
    loaded = hub.TASK_DATA / f".loaded-{counting.digest_tasks(tasks, files, evaluation.model_roles)}"
    if loaded.exists() or is_dry_run:
        print(f"The tasks {'were' if loaded.exists() else 'would be'} loaded with access to the hub: {names}")
        return
    hub.TASK_DATA.mkdir(parents=True, exist_ok=True)
    with hold_alone(hub.DOWNLOADS / ".locks" / "tasks", "loading tasks"):
        unfinished = hub.TASK_DATA / ".unfinished"
        if unfinished.exists():  # Inspect would take a data set that is only half written for a whole one
            shutil.rmtree(hub.TASK_DATA / "inspect_ai", ignore_errors=True)
        unfinished.touch()
        online = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [str(ROOT / "scripts/run"), stage, *JOB, "measure_tasks"]
        counting.load_tasks(results, tasks, files, evaluation.model_roles, command, online)
        unfinished.unlink()
    errors = list_errors(tasks, counting.read_tasks(results, tasks, files, evaluation.model_roles), source)
    if errors:
        raise InputError.join(errors)
    loaded.touch()
    print(f"Loaded with access to the hub, whose data are now in {hub.TASK_DATA}: {names}")
