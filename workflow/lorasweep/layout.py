"""Names of the files and folders in a point's folder, `results/<experiment>/<point>/`, that several stages know."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""PEFT's name for an adapter's tensors."""

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's name for an adapter's configuration."""

RECORD = "lorasweep.json"
"""Written beside an adapter, and beside a model made of one: where it comes from."""

TRAINING_LOG = "training_log.csv"
"""A row an optimizer step: beside an adapter, and in `state/train/` while it is trained."""

METRICS = "metrics.json"
"""In `eval/`: the scores of every task, and the proof that the adapter was applied."""

MANIFEST = "manifest.json"
"""What a point keeps, and how it came to be."""

STATE = "state"
"""What stages need only while they run. No output of a rule, since Snakemake deletes those of a failed job."""


def get_checkpoint_name(point: str, epoch: int) -> str:
    """Return what a point is called as it was after an earlier epoch of its training; its folder lies beside it."""
    return f"{point}__epoch={epoch}"


TRAININGS = "trainings"
"""In an experiment's folder: a folder for each training, whose adapters points take."""


def get_epoch_folder(epoch: int) -> str:
    """Return where in a training's folder the adapter of an earlier epoch lies; that of the last is `adapter`."""
    return f"epoch={epoch}"


FAILURE_RECORD = "failures.json"
"""In an experiment's folder: what failed in its last run, where something did."""

EXPERIMENT = "experiment.yaml"
"""In an experiment's folder: the whole configuration of its last run."""

POINTS = "points.json"
"""In an experiment's folder: which settings each name stands for."""

BATCHES = "batches.json"
"""In an experiment's folder: which points one job evaluates on one loaded base (mode B2)."""

REVISIONS = "revisions.json"
"""In an experiment's folder: the commits of the revisions that it names on the hub."""

WANTED_PLAN = "LORASWEEP_PLAN"
"""The variable by which `lorasweep plan` asks a dry run for the `whole` plan."""


PLAN = "plan.json"

PICTURE = "plan.svg"
"""In an experiment's folder."""

STORAGE = "storage.csv"
"""In an experiment's folder; one file for all runs, which are gaps in its times apart."""

LEDGER = "ledger.csv"

RUNS = "runs.json"

JOB_RECORDS = "jobs.csv"
"""In an experiment's folder."""

HOLDER = ".controller.json"
"""In an experiment's folder."""

LENGTHS = "lengths.json"

TASK_SIZES = "task_sizes.json"
"""In an experiment's folder: how long training samples are, and what tasks ask."""

BASELINE = "baseline"
"""Name of the untouched base model among what is evaluated."""

RESERVED_NAMES = (
    BASELINE,
    *("logs", "benchmarks", TRAININGS, "plots", "plots-partial", "tensorboard", "wandb"),
    *("points.json", "batches.json", "lengths.json", "task_sizes.json", "plan.json", "plan.svg", "experiment.yaml"),
    *("jobs.csv", "runs.json", "ledger.csv", "status.json", "failures.json", "storage.csv", "revisions.json"),
    *("results.csv", "results.parquet", "replicates.csv", "samples.parquet", "answer.json", "report.html"),
    *("results-partial.csv", "results-partial.parquet", "replicates-partial.csv", "samples-partial.parquet"),
    *("answer-partial.json", "report-partial.html"),
)
"""What lies in `results/<experiment>/` and is no trained point."""

TABLE = "results.csv"
