"""What the rules share: the sweep as a plain object, and the functions that hand each rule its part of it.

In: `config`, as Snakemake read it. Out: SWEEP, and the functions below. No rules; nothing here starts, stops, fetches
or prints anything.
"""

import os
import shlex
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "workflow"))

try:
    from lorasweep.util.errors import ending_with_a_message
    from lorasweep.experiment.sections import NAME_PATTERN
    from lorasweep.layout import METRICS
    from lorasweep.sweep.sweep import Sweep
except ModuleNotFoundError as error:
    raise WorkflowError(
        f"lorasweep needs the Python package '{error.name}' beside Snakemake: run 'make install', then "
        "'. .venv/driver/bin/activate'"
    )

USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method

# To run although there is no room by the plan.
FORCES_PLAN = str(config.pop("force_plan", False)).lower() == "true"

with ending_with_a_message():
    SWEEP = Sweep.load(
        config,
        ", ".join(map(str, workflow.overwrite_configfiles or workflow.configfiles)),
        given=workflow.config_settings.config,
        is_job=not workflow.is_main_process,
        # On a cluster each job has GPUs of its own; on one machine jobs share those of --resources gpu=N.
        shared_gpus=None if workflow.nodes else workflow.global_resources.get("gpu").value,
    )
    # Jobs were checked by the process that started them.
    if workflow.is_main_process:
        SWEEP.check(asks_inspect=not USES_CONDA)

EXPERIMENT = SWEEP.experiment
RESULTS = str(SWEEP.results)
POINTS = SWEEP.points
EVALUATED = SWEEP.evaluated

# Relative to the working directory, so that a clone that was moved reruns nothing.
RUN = shlex.quote(os.path.relpath(ROOT / "scripts/run"))

# Where a merged model is made for its evaluation: as a temporary output, or in a folder of the job's own.
MERGES_IN_TMPDIR = EXPERIMENT.evaluation.merged_models_in == "tmpdir"
MERGE_IN = "{resources.tmpdir:q}" if MERGES_IN_TMPDIR else "{output.merged:q}"

# A job that makes a merged model needs one of these; without a bound there are as many as evaluate at once.
if EXPERIMENT.evaluation.max_merged_models:
    workflow.register_resource("merged_models", EXPERIMENT.evaluation.max_merged_models)

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


def of(function):
    """Return a function of the name that a rule's wildcards hold (a point's, a training's or a batch's) as one of them."""
    return lambda wildcards: function(wildcards[0])


def in_results(path="."):
    """Return a function of a rule's wildcards that gives a path, which may have them, in the experiment's folder."""
    return lambda wildcards: os.path.normpath(f"{RESULTS}/{path}".format(**dict(wildcards.items())))


def request(rule, resource):
    """Return the function that says how much of a resource a job of a rule asks for, at each attempt."""
    return lambda wildcards, attempt: SWEEP.request(rule, resource, wildcards[0], attempt)


def get_results(wildcards):
    """What must lie there in the end: the report, the table, and what each point keeps."""
    kept = [path for point in SWEEP.folders for paths in SWEEP.get_kept_files(point).values() for path in paths]
    return ["<results>/report.html", "<results>/results.csv", *get_manifests(wildcards), *kept]


def get_recipes(wildcards):
    return [f"<results>/trainings/{training}/recipe.yaml" for training in SWEEP.trainings]


def get_manifests(wildcards):
    return [f"<results>/{point}/manifest.json" for point in sorted(SWEEP.folders)]


def get_evaluation_outputs():
    return {
        "logs": [f"<results>/{{point}}/eval/{entry.name}.eval" for entry in SWEEP.tasks],
        "metrics": f"<results>/{{point}}/eval/{METRICS}",
    }


def get_merged_output():
    """The merged model as a temporary output, unless it lies in the job's own temporary folder."""
    return {} if MERGES_IN_TMPDIR else {"merged": temp(directory("<results>/{point}/merged"))}


def get_base_fingerprint(wildcards):
    return SWEEP.base_fingerprint


def get_evaluation(wildcards):
    """What the evaluation of a point, or of every point of a batch, depends on beside the weights, as JSON."""
    point = SWEEP.batches[wildcards.batch][0] if "batch" in wildcards.keys() else wildcards.point
    return SWEEP.get_evaluation_spec(point).model_dump_json()
