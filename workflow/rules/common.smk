"""Shared code of the rules: the sweep as a plain object, and functions that give each rule its part of it.

In: `config`, as read by Snakemake. Out: SWEEP, and the functions below. This file has no rules, and does not start,
stop, download or print anything.
"""

import os
import shlex
import sys
from math import ceil
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "workflow"))

try:
    from lorasweep.cli.main import run_here
    from lorasweep.util.errors import ending_with_a_message, telling_the_log
    from lorasweep.experiment.loading import read_config
    from lorasweep.experiment.sections import NAME_PATTERN
    from lorasweep.layout import MERGED, METRICS, PRUNE, TABLES_RECORD, split_part_name
    from lorasweep.sweep.sweep import Sweep
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"lorasweep needs the Python package '{error.name}' beside Snakemake: run 'make install', then "
        "'. .venv/driver/bin/activate'"
    )

USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method

# Whether to run although there is not enough disk space according to the plan.
FORCES_PLAN = str(config.pop("force_plan", False)).lower() == "true"

CONFIG_FILES = workflow.overwrite_configfiles or workflow.configfiles

with ending_with_a_message():
    # Snakemake has read the files, but not seen keys that are there twice. Jobs read them as they are now.
    for file in CONFIG_FILES if workflow.is_main_process else ():
        read_config(Path(file))
    CONFIG_TEXTS = [Path(file).read_text(encoding="utf-8") for file in CONFIG_FILES if workflow.is_main_process]
    SWEEP = Sweep.load(
        config,
        ", ".join(map(str, CONFIG_FILES)),
        overrides=workflow.config_settings.config,
        is_job=not workflow.is_main_process,
        # On a cluster, each job has its own GPUs; on one machine, jobs share the GPUs of --resources gpu=N.
        shared_gpus=None if workflow.nodes else workflow.global_resources.get("gpu").value,
    )
    # For jobs, the process that started them has checked the sweep.
    if workflow.is_main_process:
        SWEEP.check(asks_inspect=not USES_CONDA)

EXPERIMENT = SWEEP.experiment
RESULTS = str(SWEEP.results)
POINTS = SWEEP.points
EVALUATED = SWEEP.evaluated

# Relative to the working directory, so that moving the clone does not cause reruns.
RUN = shlex.quote(os.path.relpath(ROOT / "scripts/run"))

# scripts/run starts every command with the Python of its stage.
os.environ.update(LORASWEEP_CONDA=str(int(USES_CONDA)), LORASWEEP_DRIVER=sys.executable)


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


wildcard_constraints:
    point=NAME_PATTERN,
    batch=NAME_PATTERN,
    training=NAME_PATTERN,
    part=rf"{NAME_PATTERN}__after=\d+" if EXPERIMENT.rungs else "(?!)",
    rung=r"after=\d+" if EXPERIMENT.rungs else "(?!)",


# What is to be made, by the content of the results. A job makes its own part only.
OUTDATED = []
if workflow.is_main_process:
    from lorasweep.running.outdated import find_outdated

    with ending_with_a_message():
        OUTDATED = find_outdated(SWEEP)
IS_OUTDATED = {(outdated.rule, outdated.name) for outdated in OUTDATED}
FORCED = {outdated.file for outdated in OUTDATED if outdated.reason}


def of(function):
    """Turn a function of a name (of a point, training or batch) into a function of a rule's wildcards."""
    return lambda wildcards: function(wildcards[0])


def inputs(rule, get_files):
    """Return an input function of a rule whose result is made again if it is outdated, whatever the times of files.

    `get_files` returns files, or files by kind, by the name of a point or training; "" without wildcards.
    """

    def get_inputs(wildcards):
        # Input functions are the first of our code that sees the DAG. Once: they are called for every job.
        if FORCED:
            workflow.dag.forcefiles.update(FORCED)
            FORCED.clear()
        name = next(iter(wildcards), "")
        files = get_files(name)
        if (rule, name) in IS_OUTDATED:
            return files
        if isinstance(files, dict):
            return {kind: ancient(part) for kind, part in files.items()}
        return ancient(files)

    return get_inputs


def in_results(path="."):
    """Return a function that fills a rule's wildcards into a path in the experiment's folder."""
    return lambda wildcards: os.path.normpath(f"{RESULTS}/{path}".format(**dict(wildcards.items())))


def request(rule, resource):
    """Return a function that returns how much of a resource a rule's job requests, by wildcards and attempt."""
    return lambda wildcards, attempt: SWEEP.request(rule, resource, wildcards[0], attempt)


def request_memory(rule):
    """Return a rule's resources of main memory; for each core too, if SLURM is to be asked so."""
    memory = request(rule, "mem_mb")
    if not EXPERIMENT.slurm.mem_per_cpu:
        return {"mem_mb": memory}
    return {
        "mem_mb": memory,
        "mem_mb_per_cpu": lambda wildcards, attempt, threads: ceil(memory(wildcards, attempt) / threads),
    }


def write_here(job, log, file, text):
    """Write a text as the output of a job of this process."""
    with telling_the_log(Path(log), f"{job}: "):
        Path(file).write_text(text, encoding="utf-8")


def get_results(wildcards):
    """Return the final outputs: the report, the table, and the files that each point keeps."""
    kept = [path for point in SWEEP.folders for paths in SWEEP.get_kept_files(point).values() for path in paths]
    return ["<results>/report.html", "<results>/results.csv", *get_manifests(wildcards), *kept]


def get_recipes(_):
    return [f"<results>/trainings/{training}/recipe.yaml" for training in SWEEP.trainings]


def get_manifests(_):
    return [f"<results>/{point}/manifest.json" for point in sorted(SWEEP.folders)]


def get_tables(_):
    return {
        "table": "<results>/results.csv",
        "parquet": "<results>/results.parquet",
        "replicates": "<results>/replicates.csv",
        "answer": "<results>/answer.json",
    }


def get_placement():
    """Return the resources of an evaluation that say where its model is. Not params: a change reruns nothing."""
    # All GPUs on one node: otherwise SLURM may spread them over several.
    return {"nodes": 1, "model_gpus": of(SWEEP.get_model_gpus)}


def get_evaluation(wildcards):
    """Return the EvaluationSpec of a point or batch as JSON: all that its evaluation depends on but the weights."""
    point = SWEEP.batches[wildcards.batch][0] if "batch" in wildcards.keys() else wildcards.point
    return SWEEP.get_evaluation_spec(point).model_dump_json()
