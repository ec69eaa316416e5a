"""What the rules share: the experiment, its points, where things lie, and the functions that feed the rules.

In: `config`, as Snakemake read it. Out: EXPERIMENT, POINTS, TASKS, and the functions. No rules here.
"""

import atexit
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

from snakemake.cli import get_argument_parser
from snakemake.io import IOFile
from snakemake.settings.types import DeploymentMethod


def drop_old_sources():
    """Drop Snakemake's copies of this workflow that are not what they are copied from; return whether there were any.

    It reads rules from copies that the profile keeps in `.snakemake/`, and not in the home, and never renews them.
    """
    copies = Path(workflow.sourcecache.runtime_cache_path, "file")
    old = []
    for copy in copies.rglob("*"):
        source = Path("/", copy.relative_to(copies))
        # A copy without a source is of a file that another process writes now, or that nothing reads any more.
        if copy.is_file() and source.is_file() and source.read_bytes() != copy.read_bytes():
            old.append(copy)
            copy.unlink(missing_ok=True)
    return bool(old)


def begin_anew(*arguments):
    """Replace this process by Snakemake with other arguments, in the directory where it was started."""
    os.chdir(workflow.workdir_init)
    os.execv(sys.executable, [sys.executable, "-m", "snakemake", *arguments])


def look_instead(what):
    """Replace this process by the script that looks at the experiment's results: nothing is locked, planned or run."""
    path = os.pathsep.join(filter(None, [str(ROOT / "workflow"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "scripts" / f"{what}.py"), RESULTS]
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})


def runs_jobs():
    """Whether this call is to run jobs; at this time Snakemake itself does not say so yet."""
    given, _ = get_argument_parser().parse_known_args(sys.argv[1:])
    looks = ("dryrun", "touch", "unlock", "lint", "list_rules", "list_target_rules", "summary", "detailed_summary")
    draws = ("dag", "rulegraph", "filegraph", "d3dag", "report", "containerize", "archive")
    cleans = ("cleanup_metadata", "cleanup_shadow", "delete_all_output", "delete_temp_output", "conda_create_envs_only")
    return "plan" not in sys.argv[1:] and not any(getattr(given, option, None) for option in (*looks, *draws, *cleans))


def fetch_from_hub():
    """Fetch what the experiment names on the hub, or, where no job is to run, say what a run would fetch, and end.

    It is no job of the workflow, since what the jobs are is read from the model; they find it there.
    """
    record = Path(RESULTS, hub.REVISIONS)
    references = hub.find_references(GIVEN)
    if references and workflow.is_main_process:
        # What is wrong elsewhere is said before gigabytes are fetched.
        get_baselines(GIVEN, get_points(GIVEN, SOURCE, Path(RESULTS, "points.json")), SOURCE)
        if runs_jobs():
            hub.fetch(references, record, SOURCE)
        elif missing := hub.describe_missing(references, record, SOURCE):
            print(missing)
            sys.exit()
    if workflow.is_main_process:
        hub.forget_token()
        if "download" in sys.argv[1:]:
            local = {str(hub.pin(reference, hub.read_revisions(record)).path) for reference in references.values()}
            print("Fetched:", *sorted(local)) if local else print(f"{SOURCE} names nothing on the hub.")
            sys.exit()
    return hub.with_local_paths(GIVEN, hub.read_revisions(record), SOURCE)


# Before anything else, since old rules may not fit the package.
if workflow.is_main_process and drop_old_sources():
    begin_anew(*sys.argv[1:])

ROOT = Path(workflow.basedir)
sys.path.insert(0, str(ROOT / "workflow"))

try:
    from lorasweep import hub, resources
    from lorasweep.accounts import Accounts
    from lorasweep.batches import assign_batches, read_batches, record_batches
    from lorasweep.checkpoint import read_checkpoint
    from lorasweep.costs import check_device
    from lorasweep.controller import HOLDER, give_up, hold, read_holder, release, remove_locks
    from lorasweep.dataset import check_data
    from lorasweep.errors import InputError, ending_with_a_message
    from lorasweep.evaluation import make_evaluation_spec
    from lorasweep.evaluation_state import is_evaluated
    from lorasweep.experiment import NAME_PATTERN, load_experiment, read_given_values, write_experiment
    from lorasweep.inputs import (
        check_inputs,
        check_registered_tasks,
        find_missing_model,
        find_trainer,
        has_configuration_alone,
        make_recipe,
    )
    from lorasweep.job_watcher import JobWatcher
    from lorasweep.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FAILURE_RECORD, METRICS, RECORD
    from lorasweep.layout import EXPERIMENT as EXPERIMENT_FILE
    from lorasweep.layout import get_checkpoint_name, get_stage
    from lorasweep.pipeline import get_stages
    from lorasweep.points import BASELINE, get_baselines, get_points, record_points
    from lorasweep.shapes import read_shape
    from lorasweep.slurm import cancel_jobs, find_orphans, forget_settings, mend_status_queries, mend_target_names
    from lorasweep.summary import FailureRecorder, summarise, write_failures
    from lorasweep.tasks import get_tasks
except ModuleNotFoundError as error:
    # Without the package there is no message of its own.
    print(
        f"lorasweep needs the Python package '{error.name}' beside Snakemake: run 'make install', then "
        "'. .venv/driver/bin/activate'",
        file=sys.stderr,
    )
    sys.exit(1)

WORKING_DIRECTORY = os.getcwd()

# Set for the command that `snakemake plan` becomes.
PLAN_MARK = "LORASWEEP_PLAN"

# A scheduler that is given no bound on jobs still has so many places only.
MOST_PARALLEL = 1000

# What messages call the experiment file.
SOURCE = ", ".join(str(path) for path in workflow.overwrite_configfiles or workflow.configfiles)

# To run although there is no room by the plan.
FORCES_PLAN = str(config.pop("force_plan", False)).lower() == "true"

with ending_with_a_message():
    # As it is written; EXPERIMENT has the local paths of what lies on the hub.
    GIVEN = load_experiment(read_given_values(config, workflow.config_settings.config), SOURCE)
    RESULTS = f"results/{GIVEN.experiment.name}"
    # Before anything that takes long, or that a run could be disturbed by.
    if workflow.is_main_process and (looked := [word for word in sys.argv[1:] if word in ("status", "verify")]):
        look_instead(looked[0])
    TRAINER = find_trainer(GIVEN, SOURCE)
    CONTROLLER = Path(RESULTS, HOLDER)
    BATCH_RECORD = Path(RESULTS, "batches.json")
    TASKS = get_tasks(GIVEN.evaluation.tasks, SOURCE)
    EXPERIMENT = fetch_from_hub()
    POINTS = get_points(EXPERIMENT, SOURCE, Path(RESULTS, "points.json"))
    # What is evaluated as it is: names, and the models' paths.
    BASELINES = get_baselines(EXPERIMENT, POINTS, SOURCE)

# The points that are trained, and the earlier epochs of which each keeps the adapter; the others have one that exists,
# or are such an epoch.
TRAINED = {point.name: () for point in POINTS.values() if point.is_trained}
for point in POINTS.values():
    if point.trained_by:
        TRAINED[point.trained_by] += (point.epoch,)

# The rules that train, by the earlier epochs that they keep: outputs are declared by rule. One alone is called `train`.
KEPT_EPOCHS = sorted(set(TRAINED.values()), key=len) or [()]
TRAINING_RULES = {epochs: f"train_{len(epochs)}" if epochs != KEPT_EPOCHS[0] else "train" for epochs in KEPT_EPOCHS}

# The keys that vary.
VARIABLES = sorted({key for point in POINTS.values() for key in point.swept})
VARIABLES += ["epoch"] if any(TRAINED.values()) else []

# The points that are evaluated, each with its mode.
EVALUATED = {point.name: point.mode for point in POINTS.values() if point.is_evaluated}
EVALUATED = EVALUATED if EXPERIMENT.evaluation.enabled else {}
EVALUATED |= dict.fromkeys(BASELINES, "base")

BASE_MODEL = EXPERIMENT.evaluation.base_model or EXPERIMENT.model.path
GPUS = 1 if EXPERIMENT.model.device == "cuda" else 0

# The most GPUs that one training has.
MOST_GPUS = max((POINTS[point].controls.gpus for point in TRAINED), default=1)

# On one machine with a bound on its GPUs a job at a time has them: each takes the first ones.
SHARES_GPUS = bool(GPUS) and workflow.nodes is None and workflow.global_resources.get("gpu").value is not None
EVALUATION_GPUS = GPUS * (MOST_GPUS if SHARES_GPUS else 1)

# The environment of what generates answers.
EVALUATION_STAGE = "vllm" if EXPERIMENT.evaluation.backend == "vllm" else "eval"

# Relative to the working directory, so that a clone that was moved reruns nothing.
SCRIPTS = os.path.relpath(ROOT / "scripts")
RUN = shlex.quote(f"{SCRIPTS}/run")

# Where a merged model is made for its evaluation: as a temporary output, or in a folder of the job's own.
MERGES_IN_TMPDIR = EXPERIMENT.evaluation.merged_models_in == "tmpdir"
MERGE_IN = "{resources.tmpdir:q}" if MERGES_IN_TMPDIR else "{output.merged:q}"

# A job that makes a merged model needs one of these; without a bound there are as many as evaluate at once.
if EXPERIMENT.evaluation.max_merged_models:
    workflow.global_resources["merged_models"] = EXPERIMENT.evaluation.max_merged_models

# For scripts/run, which starts every script with the Python of its stage.
USES_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
os.environ.update(LORASWEEP_CONDA=str(int(USES_CONDA)), LORASWEEP_DRIVER=sys.executable)


pathvars:
    results=RESULTS,
    logs=f"{RESULTS}/logs",
    benchmarks=f"{RESULTS}/benchmarks",


wildcard_constraints:
    point=NAME_PATTERN,
    batch=NAME_PATTERN,


def get_results(wildcards):
    """What must lie there in the end: the report, the table, and what each point keeps."""
    return [
        "<results>/report.html",
        "<results>/results.csv",
        *[f"<results>/{point}/manifest.json" for point in {**POINTS, **EVALUATED}],
        *[path for point in {**POINTS, **EVALUATED} for paths in find_kept_files(point).values() for path in paths],
    ]


def get_adapter_files(point):
    """The files of an adapter that are declared; its tokenizer lies beside them."""
    return [f"<results>/{point}/adapter/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RECORD)]


def get_checkpoint_files(epochs):
    """The files of the adapters of a training's earlier epochs."""
    return [file for epoch in epochs for file in get_adapter_files(get_checkpoint_name("{point}", epoch))]


def get_taken_adapter(wildcards):
    """The files of the adapter that a point is given."""
    return [f"{POINTS[wildcards.point].adapter}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]


def get_taken_folder(wildcards):
    return POINTS[wildcards.point].adapter


def get_manifests():
    return expand("<results>/{point}/manifest.json", point=sorted({*POINTS, *EVALUATED}))


def get_deciding_tasks():
    """The tasks as the experiment lists them, the one that decides first."""
    names = [task.name for task in TASKS] if EXPERIMENT.evaluation.enabled else []
    chosen = EXPERIMENT.report.task
    return sorted(names, key=lambda name: name != chosen)


def get_pipeline():
    """The rules with their jobs, as JSON."""
    modes = {**{point.name: point.mode for point in POINTS.values()}, **EVALUATED}
    checkpoints = [point.name for point in POINTS.values() if point.trained_by]
    return json.dumps([asdict(stage) for stage in get_stages(modes, EVALUATED, TRAINED, checkpoints)])


def digest_experiment():
    """What the report shows of the experiment, in whatever order; how it is planned and watched is no part of it."""

    def sort(value):
        if isinstance(value, dict):
            return sorted((key, sort(part)) for key, part in value.items())
        return sorted(map(sort, value), key=json.dumps) if isinstance(value, list) else value

    shown = EXPERIMENT.model_dump(by_alias=True, exclude={"plan", "training"})
    return hashlib.sha256(json.dumps(sort(shown)).encode()).hexdigest()


def get_base_fingerprint(wildcards):
    return MISSING_MODEL or read_checkpoint(Path(BASE_MODEL)).fingerprint


def get_results_folder(wildcards):
    return RESULTS


def get_benchmarks_folder(wildcards):
    return f"{RESULTS}/benchmarks"


def get_point_folder(wildcards):
    return f"{RESULTS}/{wildcards.point}"


def get_adapter_folder(wildcards):
    return f"{RESULTS}/{wildcards.point}/adapter"


def find_kept_files(point):
    """What a point keeps, less its manifest; by kind."""
    kept = {}
    if point in POINTS:
        if point in TRAINED:
            kept["recipe"] = [f"<results>/{point}/recipe.yaml"]
        kept["adapter"] = get_adapter_files(point)
        if POINTS[point].mode == "A":
            kept["model"] = [f"<results>/{point}/hf_model"]
    if point in EVALUATED:
        kept["logs"] = [f"<results>/{point}/eval/{task.name}.eval" for task in TASKS]
        kept["metrics"] = [f"<results>/{point}/eval/{METRICS}"]
    return kept


def get_kept_files(wildcards):
    return find_kept_files(wildcards.point)


def get_evaluated_model(wildcards):
    """The files that an evaluation without a merge reads, by the point's mode; of the base model none is declared."""
    if wildcards.point in BASELINES:
        return {}
    files = {"adapter": get_adapter_files(wildcards.point)}
    return files | ({"model": f"<results>/{wildcards.point}/hf_model"} if POINTS[wildcards.point].mode == "A" else {})


def get_task_files():
    """What the tasks are made of: a change in one of these evaluates anew."""
    return sorted({file for entry in TASKS for file in entry.files})


def get_evaluation_outputs():
    return {
        "logs": [f"<results>/{{point}}/eval/{entry.name}.eval" for entry in TASKS],
        "metrics": f"<results>/{{point}}/eval/{METRICS}",
    }


def get_merged_output():
    """The merged model as a temporary output, unless it lies in the job's own temporary folder."""
    return {} if MERGES_IN_TMPDIR else {"merged": temp(directory("<results>/{point}/merged"))}


def match_points(is_wanted):
    """A pattern of the names of points that are wanted."""
    points = dict.fromkeys([*POINTS, *EVALUATED])
    chosen = [point for point in points if is_wanted(point)]
    others = [point for point in points if not is_wanted(point)]
    # The shorter list makes the shorter pattern.
    few = "|".join(map(re.escape, sorted(min(chosen, others, key=len))))
    return few or "(?!)" if len(chosen) <= len(others) else f"(?!(?:{few})/){NAME_PATTERN}"


@lru_cache(maxsize=None)
def make_point_recipe(point):
    with ending_with_a_message():
        return make_recipe(EXPERIMENT, POINTS[point], f"{RESULTS}/{point}", SOURCE)


def get_recipe(wildcards):
    """The text of the point's recipe; while the base model is missing, which only a dry run outlives, what is missing."""
    return MISSING_MODEL or make_point_recipe(wildcards.point)


@lru_cache(maxsize=None)
def make_spec(mode, model, data):
    fingerprint = get_base_fingerprint(None) if model == BASE_MODEL else read_checkpoint(Path(model)).fingerprint
    return make_evaluation_spec(EXPERIMENT, TASKS, map(Path, get_task_files()), mode, fingerprint, model, data)


def get_spec(point):
    data = POINTS[point].data if point in POINTS else EXPERIMENT.data
    return make_spec(EVALUATED[point], BASELINES.get(point, BASE_MODEL), data)


def get_evaluation(wildcards):
    """What the point's evaluation depends on beside the weights, as JSON."""
    return get_spec(wildcards.point).model_dump_json()


def get_batch_evaluation(wildcards):
    """The same of every point of a batch."""
    return get_spec(BATCHES[wildcards.batch][0]).model_dump_json()


def get_batch(wildcards):
    """That the batch of a point was evaluated; how, is seen in the point's state."""
    return f"<results>/.batches/{BATCH_OF[wildcards.point]}"


def get_batch_adapters(wildcards):
    return [file for point in BATCHES[wildcards.batch] for file in get_adapter_files(point)]


def get_batch_folders(wildcards):
    return [f"{RESULTS}/{point}" for point in BATCHES[wildcards.batch]]


def read_base():
    """The base model; what its configuration says where its weights are not there; nothing where that is missing."""
    if not MISSING_MODEL:
        return read_checkpoint(Path(BASE_MODEL))
    return read_shape(Path(BASE_MODEL)) if has_configuration_alone(Path(BASE_MODEL)) else None


def plan_batches():
    """The batches of the points that are evaluated directly: those of the run, if a job asks."""
    direct = [point for point in EVALUATED if EVALUATED[point] == "B2"]
    if not workflow.is_main_process:
        recorded = read_batches(BATCH_RECORD).items()
        return {batch: here for batch, points in recorded if (here := [p for p in points if p in EVALUATED])}
    if not direct:
        return {}
    base = read_base()
    size = EXPERIMENT.evaluation.adapters_per_job
    if size == "auto":
        size = resources.get_adapters_per_job(base, EXPERIMENT.model, EXPERIMENT.evaluation) if base else len(direct)
    trained = {point for point in direct if is_trained(point)}
    done = {point for point in trained if not MISSING_MODEL and is_evaluated(get_spec(point), Path(RESULTS, point))}
    batches = {}
    # One job evaluates in one way: points that are asked otherwise have batches of their own.
    for data in dict.fromkeys(POINTS[point].data for point in direct):
        alike = [point for point in direct if POINTS[point].data == data]
        for batch, points in assign_batches(alike, done, trained, size, BATCH_RECORD).items():
            batches.setdefault(batch, []).extend(points)
    return batches


def is_trained(point):
    """Whether a point's adapter is there, and of the recipe that it has now."""
    folder = Path(RESULTS, point)
    if not all((folder / "adapter" / name).is_file() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)):
        return False
    if POINTS[point].adapter:
        return True
    training = POINTS[point].trained_by or point
    recipe = Path(RESULTS, training, "recipe.yaml")
    return bool(MISSING_MODEL) or (
        recipe.is_file() and recipe.read_text(encoding="utf-8") == make_point_recipe(training)
    )


def get_task_names(wildcards):
    return sorted(task.name for task in TASKS) if wildcards.point in EVALUATED else []


def get_settings(wildcards):
    """The settings that the point's manifest carries, as JSON."""
    if wildcards.point in POINTS:
        point = POINTS[wildcards.point]
        settings = {"mode": point.mode, **point.settings}
    else:
        settings = {"mode": "base"}
        settings |= {} if wildcards.point == BASELINE else {"model": BASELINES[wildcards.point]}
    made_on = {"dtype": EXPERIMENT.model.dtype, "device": EXPERIMENT.model.device}
    return json.dumps({**made_on, **settings}, sort_keys=True)


def from_base(compute):
    """Make a resource function: `compute` of the wildcard's value and the model, and as much more at each retry."""

    def get_amount(wildcards, attempt):
        # Only a dry run outlives a missing base model.
        if MISSING_MODEL:
            return 1000
        model = BASELINES.get(wildcards[0], BASE_MODEL) if "point" in wildcards.keys() else BASE_MODEL
        return attempt * compute(wildcards[0], read_checkpoint(Path(model)))

    return get_amount


def set_as_for_train(trains):
    """Take what is set for `train`, by a profile or on the command line, for another rule that trains too."""
    given = workflow.resource_settings
    resources = workflow.get_rule(trains).resources
    for name in ("train", trains):
        resources.update(given._parsed_overwrite_resources.get(name, {}))
    if trains not in given._parsed_overwrite_threads and (threads := given._parsed_overwrite_threads.get("train")):
        resources["_cores"] = threads


def get_train_gpus(wildcards):
    return EVALUATION_GPUS if SHARES_GPUS else GPUS * POINTS[wildcards.point].controls.gpus


def get_train_threads(wildcards):
    """Four for each process of the training."""
    return 4 * POINTS[wildcards.point].controls.gpus


train_mem_mb = from_base(lambda point, base: resources.train_mem_mb(base, POINTS[point].controls, EXPERIMENT.model))
train_runtime = from_base(
    lambda point, base: resources.train_runtime(base, POINTS[point].controls, EXPERIMENT.model, count_samples())
)
train_disk_mb = from_base(
    lambda point, base: resources.train_disk_mb(
        base, POINTS[point].controls, EXPERIMENT.model, kept=1 + len(TRAINED[point])
    )
)
merge_mem_mb = from_base(lambda point, base: resources.merge_mem_mb(base))
merge_runtime = from_base(lambda point, base: resources.merge_runtime(base, EXPERIMENT.model))
model_disk_mb = from_base(lambda point, base: resources.model_disk_mb(base, EXPERIMENT.model))
evaluate_mem_mb = from_base(lambda point, base: resources.evaluate_mem_mb(base, EXPERIMENT.model))
evaluate_merged_mem_mb = from_base(
    lambda point, base: max(resources.merge_mem_mb(base), resources.evaluate_mem_mb(base, EXPERIMENT.model))
)
evaluate_runtime = from_base(
    lambda point, base: resources.evaluate_runtime(base, EXPERIMENT.model, EXPERIMENT.evaluation)
)
evaluate_adapters_runtime = from_base(
    lambda batch, base: resources.evaluate_runtime(
        base, EXPERIMENT.model, EXPERIMENT.evaluation, adapters=len(BATCHES[batch])
    )
)
evaluate_merged_runtime = from_base(
    lambda point, base: resources.merge_runtime(base, EXPERIMENT.model)
    + resources.evaluate_runtime(base, EXPERIMENT.model, EXPERIMENT.evaluation)
)


def check_gpus():
    """Refuse a training that has more GPUs than a run on this machine is given: Snakemake would give it fewer."""
    given = workflow.global_resources.get("gpu").value
    if GPUS and given is not None and MOST_GPUS > given:
        raise InputError(
            f"{SOURCE}: controls.gpus: {MOST_GPUS} is not accepted with --resources gpu={given}; accepted: at most as many"
        )
    if SHARES_GPUS and MOST_GPUS < given:
        raise InputError(
            f"--resources gpu={given}: jobs on one machine take its first GPUs, and more than one at a time would share "
            f"them; accepted: gpu={MOST_GPUS}, or a run for each GPU with its own CUDA_VISIBLE_DEVICES and directory"
        )


@lru_cache(maxsize=None)
def count_samples():
    return check_data(EXPERIMENT.data, SOURCE)


with ending_with_a_message():
    MISSING_MODEL = find_missing_model(EXPERIMENT, SOURCE)
    # Jobs were checked by the process that started them.
    if workflow.is_main_process:
        check_device(EXPERIMENT, SOURCE)
        check_gpus()
        check_inputs(EXPERIMENT, POINTS.values(), TASKS, Path(RESULTS), SOURCE)
        # An environment of conda's is there only once the jobs run.
        if not USES_CONDA:
            check_registered_tasks(TASKS, [f"{SCRIPTS}/run", EVALUATION_STAGE], SOURCE)
        for point in () if MISSING_MODEL else TRAINED:
            make_point_recipe(point)
        if MISSING_MODEL:
            logger.warning(f"{MISSING_MODEL}\nA dry run goes on without it; a run stops here.")
    BATCHES = plan_batches()


BATCH_OF = {point: batch for batch, points in BATCHES.items() for point in points}

mend_target_names()

# Jobs on SLURM of a run that died.
ORPHANS = []

if workflow.is_main_process:
    FAILURES = FailureRecorder(Path(RESULTS, "logs"))
    logger.addHandler(FAILURES)
    WATCHER = JobWatcher()
    logger.addHandler(WATCHER)
    ACCOUNTS = None
    # True, and of no use to anybody: what a batch depends on is decided anew in each run.
    logger.addFilter(lambda record: not str(record.msg).endswith("missing metadata: evaluate_adapters"))
    forget_settings()
    mend_status_queries()
    if "--unlock" in sys.argv:
        give_up(CONTROLLER)
    holder = read_holder(CONTROLLER)
    if holder and not holder.is_gone:
        logger.warning(
            f"'{RESULTS}' is being run by {holder}. A dry run goes on; a run has to wait until that one ends. Should its "
            "machine be gone: the same command with --unlock first."
        )
    elif holder:
        if remove_locks(Path(".snakemake/locks"), RESULTS):
            logger.warning(f"A run of '{RESULTS}' by {holder} ended before it was done; its lock is removed.")
        ORPHANS = find_orphans(holder.slurm_runs)


def show_plan_instead():
    """Begin anew as a dry run that shows the plan: what is to do, Snakemake alone knows."""
    given = list(sys.argv[1:])
    given.remove("plan")
    os.environ[PLAN_MARK] = "1"
    begin_anew(*given, "--dry-run", "--quiet", "rules")


@lru_cache(maxsize=None)
def get_wanted_jobs():
    """What is to do when a run begins: pairs of a rule and the name of a point or of a batch, if it has one."""
    return {
        (get_stage(job.rule.name), str(next(iter(job.wildcards), "")))
        for job in workflow.dag.needrun_jobs(exclude_finished=False)
        if job.rule.name not in ("all", "configure_all")
    }


@lru_cache(maxsize=None)
def get_forecast():
    """The plan of this run; nothing where the base model is not known. Asked for once the jobs are."""
    from lorasweep.forecast import make_forecast

    base = read_base()
    if base is None:
        return None
    wanted = get_wanted_jobs()
    samples = count_samples() if TRAINED else 0
    files = list(map(Path, get_task_files()))
    fingerprint, parallel = "" if MISSING_MODEL else base.fingerprint, get_parallel_jobs()
    others = {name: read_checkpoint(Path(model)) for name, model in BASELINES.items() if name != BASELINE}
    return make_forecast(
        EXPERIMENT, POINTS, base, Path(RESULTS), wanted, BATCHES, fingerprint, parallel, samples, TASKS, files, others
    )


def get_parallel_jobs():
    """How many jobs run at a time: as many as there are cores for, or as --jobs says of a scheduler."""
    if EXPERIMENT.plan.parallel_jobs:
        return EXPERIMENT.plan.parallel_jobs
    cores = workflow._cores or 1
    places = [workflow.nodes or cores // min(cores, 4), MOST_PARALLEL]
    if GPUS and "gpu" in workflow.global_resources:
        # As if all jobs had as many as the training that has most.
        places.append(workflow.global_resources["gpu"].value // MOST_GPUS)
    return max(1, min(places))


def count_tokens_and_samples():
    """Have the trainer count tokens, and Inspect the samples of tasks, unless that was done."""
    from lorasweep import measuring

    results, files, base = Path(RESULTS), list(map(Path, get_task_files())), get_base_fingerprint(None)
    try:
        if (
            not MISSING_MODEL
            and TRAINED
            and not measuring.read_lengths(results, EXPERIMENT.data, base, count_samples(), EXPERIMENT.trainer)
        ):
            command = [f"{SCRIPTS}/run", TRAINER.STAGE, f"{SCRIPTS}/measure_lengths.py"]
            recipe = make_point_recipe(next(iter(TRAINED)))
            measuring.count_lengths(results, EXPERIMENT.data, base, recipe, command, EXPERIMENT.trainer)
    except InputError as error:
        print(f"Tokens are guessed: {error}")
    try:
        if EVALUATED and not measuring.read_task_sizes(results, TASKS, files):
            command = [f"{SCRIPTS}/run", EVALUATION_STAGE, f"{SCRIPTS}/measure_tasks.py"]
            measuring.count_task_sizes(results, TASKS, files, command)
    except InputError as error:
        print(f"Samples are guessed: {error}")


def show_plan():
    """Print the plan at the end of a dry run: in short, or all of it where it was asked for."""
    if not workflow.dryrun or workflow._scheduler is None:
        return  # a run, or it ended early with its own message
    os.chdir(WORKING_DIRECTORY)  # which Snakemake has left by now
    try:
        if PLAN_MARK in os.environ:
            count_tokens_and_samples()
        forecast = get_forecast()
        if forecast is None:
            print(f"No plan without {BASE_MODEL}/config.json, which alone is enough for one.")
            return
        if PLAN_MARK in os.environ:
            from rich.console import Console

            forecast.show(Console())
            print("Written:", *forecast.write())
        else:
            print(forecast.describe_shortly())
        if shortage := forecast.explain_shortage():
            print(f"A run would be refused: {shortage}")
    except InputError as error:
        print(f"{SOURCE}: {error}")


def get_orphan_dependency():
    """A resource of `train`: a training that an earlier run left going is waited for by the scheduler."""
    jobs = {orphan.point: orphan.job for orphan in ORPHANS if orphan.is_awaited}

    def depend(wildcards):
        return f"--dependency=afterany:{jobs[wildcards.point]}" if wildcards.point in jobs else ""

    return {"slurm_extra": depend} if jobs else {}


def get_slurm_run():
    """By what name the jobs of this run are known to SLURM, if they go there."""
    return getattr(workflow.scheduler._executor, "run_uuid", None)


def cancel_forgotten_jobs():
    """Cancel what still runs at the end; return whether nothing does.

    At Ctrl-C Snakemake cancels the jobs on its list, and that is empty while it asks how they are.
    """
    run = get_slurm_run()
    jobs = [job.job for job in find_orphans([run] if run else [])]
    try:
        return not (jobs and cancel_jobs(jobs))
    except (OSError, subprocess.SubprocessError) as error:
        logger.error(f"SLURM jobs {' '.join(jobs)} run on, and could not be cancelled: {error}")
        return False


def conclude(is_well):
    """Leave what a run leaves at its end, however it ended."""
    # What runs on is found by the next run, by the name that this one left.
    is_over = is_well or cancel_forgotten_jobs()
    # What says that a batch was evaluated is of this run alone: the next one puts other points together.
    for batch in BATCHES:
        workflow.persistence.cleanup_metadata(IOFile(f"{RESULTS}/.batches/{batch}"))
    for leftover in (*Path(RESULTS).glob("*/.*.partial"), Path(RESULTS, ".batches")):
        shutil.rmtree(leftover, ignore_errors=True)
    command = shlex.join(["snakemake", *sys.argv[1:]])
    points = dict.fromkeys([*POINTS, *EVALUATED])
    summary = summarise(Path(RESULTS), points, find_unfinished(), FAILURES.failures, command)
    try:
        if is_well:
            Path(RESULTS, FAILURE_RECORD).unlink(missing_ok=True)
        elif FAILURES.failures:
            write_failures(FAILURES.failures, Path(RESULTS, FAILURE_RECORD))
    except OSError as error:  # a full disk must not hide how the run went
        summary += f"\n{FAILURE_RECORD} could not be written: {error}"
    if ACCOUNTS:
        summary += f"\n{ACCOUNTS.stop(is_well)}"
    # Last, since who looks on takes a run that nobody holds for one that ended.
    if is_over:
        release(CONTROLLER)
    else:
        atexit.unregister(release)
    return summary


def find_unfinished():
    """The points of jobs that this run was to do and did not."""
    return {job.wildcards.point for job in workflow.dag.needrun_jobs() if "point" in job.wildcards.keys()}


def write_partial_results():
    """Write tables and report of the points that are done, where those of all have to wait for the rest."""
    unfinished = find_unfinished()
    done = [
        point
        for point in dict.fromkeys([*BASELINES, *POINTS])
        if point not in unfinished and Path(RESULTS, point, "manifest.json").is_file()
    ]
    if not done:
        return
    samples, table = f"{RESULTS}/samples-partial.parquet", f"{RESULTS}/results-partial.csv"
    of_these = ["--results", RESULTS, "--points", *done]
    collected = ["--variables", *VARIABLES, "--tasks", *get_deciding_tasks(), "--output", table]
    collected += ["--report", EXPERIMENT.report.model_dump_json()]
    page = ["--output", f"{RESULTS}/report-partial.html", "--plots", f"{RESULTS}/plots-partial"]
    steps = [
        ["driver", f"{SCRIPTS}/collect.py", *of_these, *collected],
        ["driver", f"{SCRIPTS}/report.py", "--table", table, "--pipeline", get_pipeline(), *page],
    ]
    # With conda, only a job has the environment that reads logs: without it there are no intervals.
    if not USES_CONDA:
        steps[0] += ["--samples", samples]
        steps.insert(0, ["eval", f"{SCRIPTS}/read_samples.py", *of_these, "--output", samples])
    for step in steps:
        made = subprocess.run([f"{SCRIPTS}/run", *step], capture_output=True, text=True)
        if made.returncode:
            logger.error(f"No report of what is done: {made.stderr.strip().rpartition(chr(10))[2]}")
            return
    logger.error(f"What is done: {table} and {RESULTS}/report-partial.html")


def drop_partial_results():
    shutil.rmtree(Path(RESULTS, "plots-partial"), ignore_errors=True)
    for name in ("samples.parquet", "results.csv", "results.parquet", "replicates.csv", "answer.json", "report.html"):
        Path(RESULTS, name.replace(".", "-partial.")).unlink(missing_ok=True)


def settle_orphans():
    """Let no job of a run that died write the same files as a job of this one."""
    for orphan in ORPHANS:
        fate = "is cancelled"
        if orphan.is_awaited:
            fate = "still runs: the same training waits for its end, and takes over what it made"
        logger.warning(f"SLURM job {orphan.job} of an earlier run ({orphan.rule} of {orphan.point}) {fate}.")
    if left := cancel_jobs(orphan.job for orphan in ORPHANS if not orphan.is_awaited):
        raise InputError(f"SLURM jobs of an earlier run do not end: scancel {' '.join(sorted(left))}, and run again")


def begin_run():
    """What a run does before its first job."""
    global ACCOUNTS
    with ending_with_a_message():
        if MISSING_MODEL:
            raise InputError(MISSING_MODEL)
        for stage in () if USES_CONDA else {TRAINER.STAGE, "eval", EVALUATION_STAGE}:
            if not (ROOT / ".venv" / stage / "installed").exists():
                raise InputError(
                    f".venv/{stage}: the environment is missing; run 'make install"
                    f"{'-vllm' if stage == 'vllm' else ''}', or use '--sdm conda'"
                )
        takes_time = any(rule == "train" or rule.startswith("evaluate") for rule, _ in get_wanted_jobs())
        if EXPERIMENT.plan.count and takes_time and not workflow.touch:
            count_tokens_and_samples()
        if shortage := (forecast := get_forecast()).explain_shortage():
            if not FORCES_PLAN:
                raise InputError(shortage)
            logger.warning(shortage)
        settle_orphans()
        # By this name the jobs of this run are found, should it die.
        run = get_slurm_run()
        awaited = {orphan.run for orphan in ORPHANS if orphan.is_awaited}
        hold(CONTROLLER, sorted(awaited | ({run} if run else set())))
        atexit.register(release, CONTROLLER)
        record_points(POINTS, Path(RESULTS, "points.json"))
        pinned = hub.with_commits(GIVEN, hub.read_revisions(Path(RESULTS, hub.REVISIONS)))
        write_experiment(pinned, Path(RESULTS, EXPERIMENT_FILE))
        if BATCHES:
            record_batches(BATCHES, BATCH_RECORD)
        logger.info(forecast.describe_shortly())
        if not workflow.touch:
            # Else Snakemake does not say when a job has ended, under --quiet progress.
            workflow.scheduler.print_progress = True
            ACCOUNTS = Accounts(forecast, WATCHER, FAILURES)
            ACCOUNTS.start()


onstart:
    begin_run()


onsuccess:
    drop_partial_results()
    logger.info(conclude(True))


onerror:
    logger.error(conclude(False))
    write_partial_results()
