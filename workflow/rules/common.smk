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
    from lorasweep.layout import METRICS, TRAININGS
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


def get_results(wildcards):
    """What must lie there in the end: the report, the table, and what each point keeps."""
    kept = [path for point in SWEEP.folders for paths in SWEEP.get_kept_files(point).values() for path in paths]
    return ["<results>/report.html", "<results>/results.csv", *get_manifests(wildcards), *kept]


def get_recipes(wildcards):
    return [f"<results>/{TRAININGS}/{training}/recipe.yaml" for training in SWEEP.trainings]


def get_manifests(wildcards):
    return [f"<results>/{point}/manifest.json" for point in sorted(SWEEP.folders)]


def get_adapter_files(point):
    """The files of an adapter that are declared; its tokenizer lies beside them."""
    return SWEEP.get_adapter_files(point)


def get_taken_recipe(wildcards):
    return f"<results>/{TRAININGS}/{POINTS[wildcards.point].training}/recipe.yaml"


def get_taken_files(wildcards):
    """The adapter of the training that a point is of; those of earlier epochs are there when it is."""
    return SWEEP.get_trained_files(POINTS[wildcards.point].training)


def get_taken_folder(wildcards):
    return SWEEP.get_taken_folder(wildcards.point)


def get_training_state(wildcards):
    return f"{RESULTS}/{TRAININGS}/{POINTS[wildcards.point].training}/state"


def get_training_adapter(wildcards):
    return f"{RESULTS}/{TRAININGS}/{wildcards.training}/adapter"


def get_epochs(wildcards):
    """The epochs whose adapters a training keeps."""
    return ",".join([*map(str, SWEEP.get_kept_epochs(wildcards.training)), "last"])


def get_cleanup_options(wildcards):
    """Whether the training's time, and the adapter's bytes, are counted for this point or for another."""
    point = POINTS.get(wildcards.point)
    options = ["--training", point.training] if point and point.is_trained else []
    return [*options, *(["--shares-adapter-of", point.shares_adapter_of] if point and point.shares_adapter_of else [])]


def get_given_adapter(wildcards):
    """The files of the adapter that a point is given."""
    return SWEEP.get_given_adapter(wildcards.point)


def get_given_folder(wildcards):
    return POINTS[wildcards.point].adapter


def get_kept_files(wildcards):
    return SWEEP.get_kept_files(wildcards.point)


def get_evaluated_model(wildcards):
    return SWEEP.get_model_files(wildcards.point)


def get_evaluation_outputs():
    return {
        "logs": [f"<results>/{{point}}/eval/{entry.name}.eval" for entry in SWEEP.tasks],
        "metrics": f"<results>/{{point}}/eval/{METRICS}",
    }


def get_merged_output():
    """The merged model as a temporary output, unless it lies in the job's own temporary folder."""
    return {} if MERGES_IN_TMPDIR else {"merged": temp(directory("<results>/{point}/merged"))}


def get_results_folder(wildcards):
    return RESULTS


def get_benchmarks_folder(wildcards):
    return f"{RESULTS}/benchmarks"


def get_point_folder(wildcards):
    return f"{RESULTS}/{wildcards.point}"


def get_adapter_folder(wildcards):
    return f"{RESULTS}/{wildcards.point}/adapter"


def get_recipe(wildcards):
    return SWEEP.get_recipe(wildcards.training)


def get_base_fingerprint(wildcards):
    return SWEEP.base_fingerprint


def get_evaluation(wildcards):
    """What the evaluation of a point, or of every point of a batch, depends on beside the weights, as JSON."""
    point = SWEEP.batches[wildcards.batch][0] if "batch" in wildcards.keys() else wildcards.point
    return SWEEP.get_evaluation_spec(point).model_dump_json()


def get_settings(wildcards):
    return SWEEP.get_settings(wildcards.point)


def get_task_names(wildcards):
    return SWEEP.get_task_names(wildcards.point)


def get_batch(wildcards):
    """That the batch of a point was evaluated; how, is seen in the point's state."""
    return f"<results>/.batches/{SWEEP.batch_of[wildcards.point]}"


def get_batch_adapters(wildcards):
    return [file for point in SWEEP.batches[wildcards.batch] for file in get_adapter_files(point)]


def get_batch_folders(wildcards):
    return [f"{RESULTS}/{point}" for point in SWEEP.batches[wildcards.batch]]


def get_train_gpus(wildcards):
    return SWEEP.get_train_gpus(wildcards.training)


def get_train_threads(wildcards):
    return SWEEP.get_train_threads(wildcards.training)


def request(rule, resource):
    """Return the function that says how much of a resource a job of a rule asks for, at each attempt."""

    def get_amount(wildcards, attempt):
        return SWEEP.request(rule, resource, wildcards[0], attempt)

    return get_amount
