"""Compute the resource requests of jobs from the checkpoint's headers, the settings and the data.

The figures are requests, not predictions: they include a margin, and grow with every attempt. docs/resources.md has
the formulas. Predictions are in lorasweep.planning.costs.
"""

from math import ceil, prod
from pathlib import Path

from lorasweep.checkpoints.architecture import get_architecture
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.dtypes import BYTES
from lorasweep.checkpoints.lora import count_lora_parameters, count_saved_values
from lorasweep.experiment.devices import get_device
from lorasweep.experiment.roles import get_folders
from lorasweep.experiment.sections import DATA_KEYS, MOST_ADAPTERS, Controls, Data, Evaluation, Experiment, Model

PROCESS_MB = 3000
"""Memory in MB of Python with torch, transformers and a framework, without the weights."""

FLOPS = {"cuda": 3e13, "cpu": 4e10}
"""Assumed floating point operations per second: a third of a 100 TFLOP/s GPU; two CPU cores."""

BANDWIDTH = {"cuda": 5e11, "cpu": 1e10}
"""Assumed bytes of weights per second in decoding."""

DISK_BANDWIDTH = 2e8
"""Assumed bytes per second at which a shared file system reads or writes."""

START_SECONDS = 60
"""Seconds from the start of a job to the first byte of the model: scheduler, Snakemake, imports."""

UNSTATED_LENGTH = 2048
"""Assumed tokens of a sample without a `max_seq_len` limit, and of an answer without a `max_tokens` limit."""

UNSTATED_SAMPLES = 1000
"""Assumed samples of a task without a `limit`."""

DATA_SHARE = 4
"""Main memory of a training's samples, in sizes of their files."""

WEIGHTS_SHARE = 0.7
"""Share of a GPU's memory that an evaluation's weights may take; the rest is for the cache of keys and values."""

QUANTIZED_BYTES = {"nf4": 0.55, "int8": 1.05}
"""Bytes of a quantized weight in training, with its share of the scales and of what is not quantized."""

MB = 1_000_000


def get_effective_batch(controls: Controls) -> int:
    """Return the samples of an optimizer step."""
    return controls.batch_size * controls.gradient_accumulation_steps * controls.gpus


def train_mem_mb(checkpoint: Checkpoint, controls: Controls, model: Model, data: Data) -> int:
    """Return the main memory of a training in MB: the stored checkpoint, the model made from it, and the samples.

    Multiplied by the number of processes: each reads the whole checkpoint, and the first gathers the model again. Each
    also holds the tokens of all samples, 5 bytes each, and some text while it reads: 4 times the size of the files.

    On a CPU, main memory also holds the adapter's gradients and optimizer state (12 bytes more per value) and the
    activations: 17 · b · s · h values per layer, and three times the logits b · s · V. Activation checkpointing keeps
    one layer's values. The factor 17 is from Korthikanti et al. 2022 (arXiv:2205.05198), table 2, without the
    attention scores, which PyTorch's scaled dot-product attention does not store.

    A quantized model (`model.quantize`) takes 0.55 (`nf4`) or 1.05 bytes (`int8`) per parameter.
    """
    size = sum(tensor.size for tensor in checkpoint.tensors.values())
    weight = QUANTIZED_BYTES[model.quantize] if model.quantize else BYTES[model.dtype]
    weights = checkpoint.num_parameters * weight
    files = [Path(file) for key in DATA_KEYS for file in data.get_files(key)]
    need = size + weights + DATA_SHARE * sum(file.stat().st_size for file in files if file.is_file())
    if model.device == "cpu":
        architecture = get_architecture(checkpoint)
        tokens = controls.batch_size * _sample_length(checkpoint, controls)
        layers = 1 if controls.enable_activation_checkpointing else architecture.num_layers
        values = tokens * (17 * architecture.hidden_size * layers + 3 * architecture.vocab_size)
        need += values * BYTES[model.dtype] + count_lora_parameters(checkpoint, controls) * (BYTES[model.dtype] + 12)
    return controls.gpus * (PROCESS_MB + ceil(need / MB))


def train_runtime(checkpoint: Checkpoint, controls: Controls, model: Model, samples: int) -> int:
    """Return the time of a training in minutes: 15, plus three times 4 · parameters · tokens / (FLOPS · GPUs).

    4 operations per parameter and token: 2 forward, 2 for the gradients of activations. LoRA needs no gradients of the
    base weights.
    """
    steps = ceil(samples / get_effective_batch(controls))
    if controls.max_steps_per_epoch:
        steps = min(steps, controls.max_steps_per_epoch)
    seen = steps * get_effective_batch(controls) * controls.epochs
    operations = 4 * checkpoint.num_parameters * seen * _sample_length(checkpoint, controls)
    return 15 + ceil(3 * operations / FLOPS[model.device] / 60 / controls.gpus)


def train_disk_mb(checkpoint: Checkpoint, controls: Controls, model: Model, trainer: str, kept: int = 1) -> int:
    """Return the disk space of a training in MB: two adapters per epoch, `kept` adapters, and the saved states."""
    adapter = count_saved_values(checkpoint, controls) * BYTES[model.dtype]
    states = count_state_bytes(checkpoint, controls, model, trainer)
    return 100 + ceil(((2 * controls.epochs + kept) * adapter + states) / MB)


def count_state_bytes(checkpoint: Checkpoint, controls: Controls, model: Model, trainer: str) -> int:
    """Return the bytes of a training's saved states: two, each with the weights and AdamW's two moments.

    The trainer `trl` has them in fp32, whatever the precision is.
    """
    return 6 * count_lora_parameters(checkpoint, controls) * (4 if trainer == "trl" else BYTES[model.dtype])


def model_disk_mb(checkpoint: Checkpoint, model: Model) -> int:
    """Return the size in MB of a full model in the experiment's precision, with its tokenizer."""
    return 50 + ceil(checkpoint.num_parameters * BYTES[model.dtype] / MB)


def merge_mem_mb(checkpoint: Checkpoint) -> int:
    """Return the main memory of a merge in MB: three float32 copies of the largest tensor.

    A merge works on some rows of a tensor at a time; verification needs the three copies.
    """
    largest = max(prod(tensor.shape) for tensor in checkpoint.tensors.values())
    return PROCESS_MB + ceil(3 * 4 * largest / MB)


def merge_runtime(checkpoint: Checkpoint, model: Model) -> int:
    """Return the time of a merge in minutes: 10, plus twice the time to read and write the model."""
    return 10 + ceil(4 * checkpoint.num_parameters * BYTES[model.dtype] / DISK_BANDWIDTH / 60)


def evaluate_mem_mb(checkpoint: Checkpoint, model: Model) -> int:
    """Return the main memory of an evaluation in MB: 1.5 times the model, which passes through it on loading."""
    return PROCESS_MB + 1000 + ceil(1.5 * checkpoint.num_parameters * BYTES[model.dtype] / MB)


def roles_mem_mb(evaluation: Evaluation) -> int:
    """Return the main memory of the local models of roles in MB: 1.5 times their files, as for the evaluated model."""
    return ceil(1.5 * _count_role_bytes(evaluation) / MB)


def _count_role_bytes(evaluation: Evaluation) -> int:
    # Roles with the same settings share a model.
    roles = {role.model_dump_json(): role for role in evaluation.model_roles.values()}
    folders = [folder for role in roles.values() if (folder := get_folders(role.model, role.args)[0])]
    return sum(tensor.size for folder in folders for tensor in read_checkpoint(Path(folder)).tensors.values())


def evaluate_runtime(checkpoint: Checkpoint, model: Model, evaluation: Evaluation, adapters: int = 1) -> int:
    """Return the time of an evaluation in minutes: 15, plus loading the model, plus the answers of each adapter."""
    seconds = _load_seconds(checkpoint, model) + adapters * _answer_seconds(checkpoint, model, evaluation)
    return 15 + ceil(seconds / 60)


def get_adapters_per_job(checkpoint: Checkpoint, model: Model, evaluation: Evaluation) -> int:
    """Return how many points one job evaluates on one loaded base model: the experiment's `adapters_per_job`.

    With `auto`, start and load take a tenth of the job's time, as far as the job ends within `job_minutes`. More points
    per job would save little time, and leave fewer jobs to run in parallel.
    """
    if evaluation.adapters_per_job != "auto":
        return evaluation.adapters_per_job
    start = START_SECONDS + _load_seconds(checkpoint, model)
    each = _answer_seconds(checkpoint, model, evaluation)
    return max(1, min(ceil(9 * start / each), int((60 * evaluation.job_minutes - start) / each), MOST_ADAPTERS))


def get_evaluation_gpus(checkpoint: Checkpoint | None, model: Model, experiment: Experiment) -> int:
    """Return the number of GPUs that hold the model of an evaluation: the experiment's `evaluation.gpus`.

    With `auto`, as few as hold P · w bytes, and the local models of roles, in `WEIGHTS_SHARE` of their memory; for
    vLLM, a number that divides the model's heads. 1 on a CPU, and for a model whose size is not known.
    """
    gpus = experiment.evaluation.gpus
    if gpus != "auto":
        return gpus
    memory = get_device(experiment).memory
    if model.device == "cpu" or checkpoint is None or memory is None:
        return 1
    weights = checkpoint.num_parameters * BYTES[model.dtype] + _count_role_bytes(experiment.evaluation)
    least = ceil(weights / (WEIGHTS_SHARE * memory))
    if experiment.evaluation.backend == "vllm":
        heads = get_architecture(checkpoint).num_heads or least
        return next((gpus for gpus in range(least, heads + 1) if can_split(checkpoint, gpus)), least)
    return least


def can_split(checkpoint: Checkpoint, gpus: int) -> bool:
    """Whether vLLM can split each tensor over so many GPUs: they divide the heads of queries and those of keys.

    Fewer heads of keys than GPUs are copied, if their number divides that of the GPUs.
    """
    architecture = get_architecture(checkpoint)
    heads = architecture.num_heads or gpus
    keys = architecture.num_key_value_heads or heads
    return heads % gpus == 0 and 0 in (keys % gpus, gpus % keys)


def _load_seconds(checkpoint: Checkpoint, model: Model) -> float:
    return checkpoint.num_parameters * BYTES[model.dtype] / DISK_BANDWIDTH


def _answer_seconds(checkpoint: Checkpoint, model: Model, evaluation: Evaluation) -> float:
    """Return the seconds of all answers of one model.

    A batch of `max_connections` answers reads every weight once per token: samples / max_connections · max_tokens ·
    bytes / BANDWIDTH. A batch takes at least one second, Inspect's overhead.
    """
    token = checkpoint.num_parameters * BYTES[model.dtype] / BANDWIDTH[model.device]
    seconds = 0.0
    for task in evaluation.tasks:
        answers = (task.limit or UNSTATED_SAMPLES) * (task.epochs or 1)
        length = task.max_tokens or evaluation.max_tokens or UNSTATED_LENGTH
        seconds += ceil(answers / evaluation.max_connections) * max(1, length * token)
    return seconds


def _sample_length(checkpoint: Checkpoint, controls: Controls) -> int:
    longest = get_architecture(checkpoint).max_positions
    return controls.max_seq_len or min(UNSTATED_LENGTH, longest or UNSTATED_LENGTH)
