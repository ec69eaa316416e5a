"""Names of files and folders in `results/<experiment>/` and `results/<experiment>/<point>/` that several stages use."""

import re
from pathlib import Path

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for an adapter's tensors."""

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's name for an adapter's configuration."""

RECORD = "lorasweep.json"
"""Record of the origin of an adapter or of a merged model, in the same folder."""

TEMPLATE_DIGEST = "chat_template_sha256"
"""Key in such a record: the sha256 of the chat template beside it, if it is not the base model's own."""

TRAINING_LOG = "training_log.csv"
"""Log with one row per optimizer step: beside an adapter, and in `state/train/` during the training."""

METRICS = "metrics.json"
"""File in `eval/` with the scores of every task, and the proof that the adapter was applied."""

CHANGED_MEANWHILE = (
    "it was not evaluated as this run had planned, since something that the evaluation depends on (a task's file, a "
    "chat template, a judge, the base model) has changed meanwhile; run the same command again"
)
"""Why the result in `eval/` is not taken."""

CARD = "README.md"
"""The model card of a published point, and of a model on the Hugging Face hub."""

REPRODUCTION = "reproduce.py"
"""Script in `eval/` that runs the evaluation again."""

MANIFEST = "manifest.json"
"""List of the files that a point keeps, with their provenance."""


def find_part(point: Path, part: str) -> Path:
    """Return the folder `adapter` or `hf_model` of a point. A published point has the files of one at its top."""
    return point / part if (point / part).is_dir() else point


STATE = "state"
"""Folder of files that stages need only while they run. It is not a rule's output, since Snakemake deletes the outputs
of a failed job."""


def get_checkpoint_name(point: str, epoch: int) -> str:
    """Return the name of the point that stands for an earlier epoch of a point's training."""
    return f"{point}__epoch={epoch}"


TRAININGS = "trainings"
"""Folder in an experiment's folder, with a subfolder for each training. Points take their adapters from there."""


def get_epoch_folder(epoch: int) -> str:
    """Return the folder of an earlier epoch's adapter in a training's folder. That of the last epoch is `adapter`."""
    return f"epoch={epoch}"


RUNGS = "rungs"
"""Folder in a training's folder with the adapters after the epochs at which `prune` compares settings, each in a
subfolder `after=<epoch>`, until the training has ended."""

PRUNE = "prune"
"""Folder in an experiment's folder with what `prune` compares and decides: for each training and epoch a record,
`<training>__after=<epoch>.json`, the scores on a task in `scores/`, and the decisions `after=<epoch>.json`."""

RACE = "race.json"
"""File in that folder: the trainings that compete, those that decisions let go on, and the settings of `prune`."""


def get_rung_name(after: int) -> str:
    """Return the name of the comparison of settings after an epoch."""
    return f"after={after}"


def get_part_name(training: str, after: int) -> str:
    """Return the name of the part of a training, or of its point's training, that ends after an epoch."""
    return f"{training}__{get_rung_name(after)}"


def split_part_name(name: str) -> tuple[str, int | None]:
    """Return the training and the epoch in the name of a part; of a training as a whole, its name and `None`."""
    match = re.fullmatch(r"(.+)__after=(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def get_rung_folder(training: Path, after: int) -> Path:
    """Return the folder of a training's adapter after an epoch; `training` is the training's folder."""
    return training / RUNGS / get_rung_name(after)


def get_part_file(results: Path, training: str, after: int) -> Path:
    """Return the record of the part of a training that ends after an epoch; `results` is the experiment's folder."""
    return results / PRUNE / f"{get_part_name(training, after)}.json"


def get_decision_file(results: Path, after: int) -> Path:
    """Return the file of the decision after an epoch; `results` is the experiment's folder."""
    return results / PRUNE / f"{get_rung_name(after)}.json"


LAST_EPOCH = "epoch=last"
"""Folder of the last epoch's adapter in a training's folder, until a task has chosen the epoch for `adapter`."""


MERGED = ".scratch/merged"
"""Folder in an experiment's folder with the merged models of mode B1, each in a subfolder named after its point. Its
parent is a link if the models are elsewhere (`evaluation.merged_models_in`)."""

FAILURE_RECORD = "failures.json"
"""File in an experiment's folder: the failures of the last run, if any."""

EXPERIMENT = "experiment.yaml"
"""File in an experiment's folder: the complete configuration of its last run."""

POINTS = "points.json"
"""File in an experiment's folder: the settings of each point."""

BATCHES = "batches.json"
"""File in an experiment's folder: the points that one job evaluates on one loaded base (mode B2)."""

REVISIONS = "revisions.json"
"""File in an experiment's folder: the commits of the revisions that it names on the hub."""

WANTED_PLAN = "LORASWEEP_PLAN"
"""Environment variable with which `lorasweep plan` requests the `whole` plan from a dry run."""


PLAN = "plan.json"

PICTURE = "plan.svg"
"""Plot of the plan in an experiment's folder."""

STORAGE = "storage.csv"
"""Log of disk usage in an experiment's folder, one file for all runs. Gaps in its times separate the runs."""

LEDGER = "ledger.csv"

RUNS = "runs.json"

JOB_RECORDS = "jobs.csv"
"""Record of all attempts of jobs in an experiment's folder."""

HOLDER = ".controller.json"
"""File in an experiment's folder that names the process that runs it."""

LENGTHS = "lengths.json"

TASK_SIZES = "task_sizes.json"
"""Files in an experiment's folder: the token counts of training samples, and what is known of loaded tasks."""

RECIPES = "recipes.json"
"""File in an experiment's folder: what cannot be built of the recipes' parts."""

SLURM = ".slurm"
"""Folder in an experiment's folder for a run on SLURM: its copy of the experiment's files, the logs of its SLURM jobs,
what is known of each job, the locks of their outputs, and SLURM's outages."""

BENCHMARKS = "benchmarks"
"""Folder in an experiment's folder for what is measured of jobs: Snakemake's files `<rule>/<name>.tsv`, and ours."""


def get_usage_file(results: Path, rule: str, name: str) -> Path:
    """Return the file of how busy a job kept its GPUs and cores. `name` is that of a point or a training."""
    return results / BENCHMARKS / rule / f"{name}.json"


BASELINE = "baseline"
"""Point name of the unmodified base model."""


def get_baseline_name(model: str | None) -> str:
    """Return the point name of an unmodified base model, which may have a name under `models`."""
    return f"{BASELINE}__model={model}" if model else BASELINE


def is_base(name: str) -> bool:
    """Whether a point's name is that of an unmodified base model, not of another baseline."""
    return name == BASELINE or name.startswith(f"{BASELINE}__model=")


RESERVED_NAMES = (
    BASELINE,
    *("logs", BENCHMARKS, TRAININGS, PRUNE, "plots", "plots-partial", "tensorboard", "wandb", "mlflow"),
    *("points.json", "batches.json", "tables.json", "lengths.json", "task_sizes.json", "recipes.json"),
    *("plan.json", "plan.svg", "experiment.yaml"),
    *("jobs.csv", "runs.json", "ledger.csv", "status.json", "failures.json", "storage.csv", "revisions.json"),
    *("results.csv", "results.parquet", "replicates.csv", "samples.parquet", "answer.json", "report.html"),
    *("results-partial.csv", "results-partial.parquet", "replicates-partial.csv", "samples-partial.parquet"),
    *("answer-partial.json", "report-partial.html"),
)
"""Names in `results/<experiment>/` that a trained point must not have."""

TABLE = "results.csv"

TABLES_RECORD = "tables.json"
"""File in an experiment's folder that says of what its tables and its report were made."""

DIGESTS = ".digests.json"
"""File in an experiment's folder: digests of files whose size or time differs from that in their point's manifest."""
