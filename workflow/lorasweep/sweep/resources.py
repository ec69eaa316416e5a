"""What jobs ask of a machine, computed from the checkpoint's headers, the settings and the data.

The figures are requests, not predictions: they leave room, and grow with every attempt. docs/resources.md says the
same as formulas; the plan of a sweep is another thing.
"""

from math import ceil, prod

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.dtypes import BYTES
from lorasweep.checkpoints.lora import count_lora_parameters
from lorasweep.experiment.sections import MOST_ADAPTERS, Controls, Evaluation, Model

PROCESS_MB = 3000
"""Python with torch, transformers and a framework, and what they keep beside the weights."""

FLOPS = {"cuda": 3e13, "cpu": 4e10}
"""Floating point operations a second that a job can count on: a third of a 100 TFLOP/s GPU; two cores of a CPU."""

BANDWIDTH = {"cuda": 5e11, "cpu": 1e10}
"""Bytes of weights a second that decoding can count on."""

DISK_BANDWIDTH = 2e8
"""Bytes a second that a shared file system can be counted on to read or write."""

START_SECONDS = 60
"""Seconds from the start of a job to the first byte of the model: the scheduler's, Snakemake's, the imports."""

UNSTATED_LENGTH = 2048
"""Tokens of a sample where `max_seq_len` sets no limit, and of an answer where `max_tokens` sets none."""

UNSTATED_SAMPLES = 1000
"""Samples of a task where `limit` sets none."""

SAVED_STATES = 6
"""Sizes of the adapter that the saved states of a training take: two, each with AdamW's two moments."""


MB = 1_000_000


def get_effective_batch(controls: Controls) -> int:
    """Return the samples of an optimizer step."""
    return controls.batch_size * controls.gradient_accumulation_steps * controls.gpus


def train_mem_mb(checkpoint: Checkpoint, controls: Controls, model: Model) -> int:
    """Return the main memory of a training in MB: the checkpoint as it is stored, and the model made of it.

    Each of several processes reads all of the checkpoint, and the first one gathers the model again: so it is as many
    times as much.

    On a CPU the adapter's gradients and optimizer state (12 bytes a value more) and the activations are there too:
    17 · b · s · h values a layer (Korthikanti et al. 2022, arXiv:2205.05198, table 2, without attention scores, which
    PyTorch's scaled dot-product attention does not keep), or a layer's alone under activation checkpointing, and
    three times the logits b · s · V.
    """
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    weights = checkpoint.num_parameters * BYTES[model.dtype]
    need = size + weights
    if model.device == "cpu":
        config = checkpoint.config
        tokens = controls.batch_size * _sample_length(checkpoint, controls)
        layers = 1 if controls.enable_activation_checkpointing else config.get("num_hidden_layers", 1)
        values = tokens * (17 * config.get("hidden_size", 0) * layers + 3 * config.get("vocab_size", 0))
        need += values * BYTES[model.dtype] + count_lora_parameters(checkpoint, controls) * (BYTES[model.dtype] + 12)
    return controls.gpus * (PROCESS_MB + ceil(need / MB))


def train_runtime(checkpoint: Checkpoint, controls: Controls, model: Model, samples: int) -> int:
    """Return the time of a training in minutes: 15, and three times 4 · parameters · tokens / (FLOPS · GPUs).

    4 operations a parameter and token: 2 forward, 2 for the gradients of activations; LoRA needs none of the weights'.
    """
    steps = ceil(samples / get_effective_batch(controls))
    if controls.max_steps_per_epoch:
        steps = min(steps, controls.max_steps_per_epoch)
    seen = steps * get_effective_batch(controls) * controls.epochs
    operations = 4 * checkpoint.num_parameters * seen * _sample_length(checkpoint, controls)
    return 15 + ceil(3 * operations / FLOPS[model.device] / 60 / controls.gpus)


def train_disk_mb(checkpoint: Checkpoint, controls: Controls, model: Model, kept: int = 1) -> int:
    """Return the disk of a training in MB: two copies of the adapter an epoch, those `kept`, saved states."""
    size = count_lora_parameters(checkpoint, controls) * BYTES[model.dtype]
    return 100 + ceil((2 * controls.epochs + kept + SAVED_STATES) * size / MB)


def model_disk_mb(checkpoint: Checkpoint, model: Model) -> int:
    """Return the size in MB of a full model in the experiment's precision, and of its tokenizer."""
    return 50 + ceil(checkpoint.num_parameters * BYTES[model.dtype] / MB)


def merge_mem_mb(checkpoint: Checkpoint) -> int:
    """Return the main memory of a merge in MB: nothing of the model, but the largest tensor.

    A merge works on some rows of a tensor at a time; to verify one takes it in float32 three times.
    """
    largest = max(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return PROCESS_MB + ceil(3 * 4 * largest / MB)


def merge_runtime(checkpoint: Checkpoint, model: Model) -> int:
    """Return the time of a merge in minutes: 10, and what reading and writing the model takes, twice."""
    return 10 + ceil(4 * checkpoint.num_parameters * BYTES[model.dtype] / DISK_BANDWIDTH / 60)


def evaluate_mem_mb(checkpoint: Checkpoint, model: Model) -> int:
    """Return the main memory of an evaluation in MB: the model once and a half, as it is loaded through it."""
    return PROCESS_MB + 1000 + ceil(1.5 * checkpoint.num_parameters * BYTES[model.dtype] / MB)


def evaluate_runtime(checkpoint: Checkpoint, model: Model, evaluation: Evaluation, adapters: int = 1) -> int:
    """Return the time of an evaluation in minutes: 15, the load of the model, and the answers for each adapter."""
    seconds = _load_seconds(checkpoint, model) + adapters * _answer_seconds(checkpoint, model, evaluation)
    return 15 + ceil(seconds / 60)


def get_adapters_per_job(checkpoint: Checkpoint, model: Model, evaluation: Evaluation) -> int:
    """Return how many points one job evaluates on one loaded base: what the experiment says.

    Where it says `auto`: as many as make start and load a tenth of the job's time, but no more than are done in
    `job_minutes`. Beyond that more of them save little, and fewer GPUs share the work.
    """
    if evaluation.adapters_per_job != "auto":
        return evaluation.adapters_per_job
    start = START_SECONDS + _load_seconds(checkpoint, model)
    each = _answer_seconds(checkpoint, model, evaluation)
    return max(1, min(ceil(9 * start / each), int((60 * evaluation.job_minutes - start) / each), MOST_ADAPTERS))


def _load_seconds(checkpoint: Checkpoint, model: Model) -> float:
    return checkpoint.num_parameters * BYTES[model.dtype] / DISK_BANDWIDTH


def _answer_seconds(checkpoint: Checkpoint, model: Model, evaluation: Evaluation) -> float:
    """Seconds of all answers of one model.

    A batch of `max_connections` answers reads every weight once a token: samples / max_connections · max_tokens ·
    bytes / BANDWIDTH; and a batch takes a second at least, which is Inspect's own.
    """
    token = checkpoint.num_parameters * BYTES[model.dtype] / BANDWIDTH[model.device]
    seconds = 0.0
    for task in evaluation.tasks:
        answers = (task.limit or UNSTATED_SAMPLES) * (task.epochs or 1)
        length = task.max_tokens or evaluation.max_tokens or UNSTATED_LENGTH
        seconds += ceil(answers / evaluation.max_connections) * max(1, length * token)
    return seconds


def _sample_length(checkpoint: Checkpoint, controls: Controls) -> int:
    longest = int(checkpoint.config.get("max_position_embeddings", UNSTATED_LENGTH))
    return controls.max_seq_len or min(UNSTATED_LENGTH, longest)
