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


def get_stage(rule: str) -> str:
    """Return the stage of a rule: trainings that keep other epochs are rules of their own, `train_<how many>`."""
    return "train" if rule.startswith("train_") else rule


def get_checkpoint_name(point: str, epoch: int) -> str:
    """Return what a point is called as it was after an earlier epoch of its training; its folder lies beside it."""
    return f"{point},epoch={epoch}"


FAILURE_RECORD = "failures.json"
"""In an experiment's folder: what failed in its last run, where something did."""

EXPERIMENT = "experiment.yaml"
"""In an experiment's folder: the whole configuration of its last run."""
