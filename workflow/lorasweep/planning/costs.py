"""How long the jobs of a sweep are expected to take: a stated model, corrected by what earlier runs took.

The model counts floating point operations and bytes, and divides them by what a device does; docs/plan.md has its
formulas. Requests to a scheduler, which leave room, are another thing: lorasweep.resources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.dtypes import BYTES
from lorasweep.checkpoints.lora import count_lora_parameters
from lorasweep.experiment.devices import DEFAULT_DEVICES, DEVICES
from lorasweep.experiment.points import Point
from lorasweep.experiment.sections import Controls, Device, Evaluation, Experiment
from lorasweep.sweep.resources import get_effective_batch

BANDWIDTH_EFFICIENCY = 0.5
"""Share of the memory's bandwidth that decoding reaches."""

START_SECONDS = 15.0
"""Of a job that loads a framework, from its start to the first byte of the model."""

ADOPT_SECONDS = 10.0
"""Of a job that checks an adapter and copies it."""

DISK_BANDWIDTH = 1e9
"""Bytes a second of reading or writing a model."""

PROMPT_TOKENS = 256
"""Tokens of an evaluation's prompt, where the task was not looked at."""

TEMPLATE_TOKENS = 32
"""Tokens that a chat template and a system prompt put around a prompt."""

ANSWER_TOKENS = 256
"""Tokens of an answer where `max_tokens` sets no limit."""

TASK_SAMPLES = 1000
"""Samples of a task where `limit` sets none, and the task was not looked at."""

BYTES_PER_TOKEN = 4
"""Of text of which the tokens were not counted."""


@dataclass(frozen=True)
class Lengths:
    """How long training samples are, in tokens."""

    samples: int
    lengths: tuple[float, ...]
    """Of some samples, evenly taken; or one mean."""
    are_counted: bool
    """By the trainer's own tokenizer; otherwise they are guessed from the bytes."""

    @cached_property
    def _means(self) -> dict[int | None, float]:
        return {}

    def get_mean(self, limit: int | None) -> float:
        """Return the mean length of samples that are cut to `limit`; every point of a sweep asks, few limits differ."""
        if limit not in self._means:
            self._means[limit] = sum(min(length, limit or length) for length in self.lengths) / len(self.lengths)
        return self._means[limit]


@dataclass(frozen=True)
class TaskSize:
    """What a task asks of a model."""

    samples: int
    """Answers: samples times epochs."""
    prompt_tokens: float
    """Of a sample, the mean."""
    max_tokens: int | None = None
    """Of an answer, where the task has a limit of its own."""


@dataclass(frozen=True)
class Training:
    """What a training goes through."""

    steps: int
    """Optimizer steps."""
    tokens: int


@dataclass(frozen=True)
class Costs:
    """The expected seconds of every job of an experiment."""

    experiment: Experiment
    base: Checkpoint
    data: Lengths
    tasks: Mapping[str, TaskSize] = field(default_factory=dict)
    """Of tasks that were looked at, by name."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """How many times longer than modelled jobs of a rule took before."""

    @cached_property
    def device_name(self) -> str:
        return self.experiment.plan.device or DEFAULT_DEVICES[self.experiment.model.device]

    @cached_property
    def device(self) -> Device:
        return {**DEVICES, **self.experiment.plan.devices}[self.device_name]

    @cached_property
    def _flops(self) -> float:
        device = self.device
        peak = device.bf16_flops if self.experiment.model.dtype == "bf16" else device.fp32_flops
        return peak * self.experiment.plan.efficiency

    @cached_property
    def _matrix_values(self) -> int:
        """Parameters that every token is multiplied with: an embedding that is not the head too is looked up."""
        embedding = next((t for name, t in self.base.tensors.items() if "embed_tokens" in name), None)
        looked_up = 0 if self.base.tied or embedding is None else embedding.shape[0] * embedding.shape[1]
        return self.base.num_parameters - looked_up

    @cached_property
    def _model_bytes(self) -> int:
        return self.base.num_parameters * BYTES[self.experiment.model.dtype]

    def get_training(self, controls: Controls) -> Training:
        """Return the steps and tokens of a training; a trainer leaves out batches that are not full."""
        count, mean = self.data.samples, self.data.get_mean(controls.max_seq_len)
        if controls.packed and controls.max_seq_len:
            count, mean = max(1, int(count * mean / controls.max_seq_len)), float(controls.max_seq_len)
        # Of several GPUs each has as many samples as the others: some are seen twice.
        batches = ceil(count / controls.gpus) // controls.batch_size
        steps = batches // controls.gradient_accumulation_steps
        if controls.max_steps_per_epoch:
            steps = min(steps, controls.max_steps_per_epoch)
        seen = steps * get_effective_batch(controls) * controls.epochs
        return Training(steps * controls.epochs, round(seen * mean))

    def model(self, rule: str, points: Sequence[Point | None]) -> float:
        """Return the modelled seconds of a job; a point that is none is a baseline."""
        if rule == "adopt":
            return ADOPT_SECONDS
        load = START_SECONDS + self._model_bytes / DISK_BANDWIDTH
        if rule == "train":
            return load + sum(self._train(point.controls) for point in points if point)
        merge = 2 * self._model_bytes / DISK_BANDWIDTH
        if rule == "merge":
            return START_SECONDS + merge
        answers = len(points) * self._answer(self.experiment.evaluation)
        return load + answers + (merge if rule == "evaluate_merged" else 0)

    def is_counted(self, rule: str) -> bool:
        """Whether what a rule's time depends on was counted, and not guessed."""
        if rule == "train":
            return self.data.are_counted
        return bool(self.tasks) or not rule.startswith("evaluate")

    def estimate(self, rule: str, points: Sequence[Point | None]) -> float:
        """Return the expected seconds: those of the model, times what the rule's jobs took longer before."""
        return self.model(rule, points) * self.factors.get(rule, 1.0)

    def _train(self, controls: Controls) -> float:
        """4 P + 6 P_lora operations a token, and 6 L h s for attention; once more forward under checkpointing;
        all shared by the GPUs, as if they had nothing to tell each other.

        2 P forward and 2 P for the gradients of activations: LoRA needs none of the weights' (Hu et al. 2021,
        arXiv:2106.09685). Attention: 2 L h s forward of causal sequences of s tokens, and twice that backward.
        """
        training = self.get_training(controls)
        length = self.data.get_mean(controls.max_seq_len)
        config = self.base.config
        attention = 2 * config.get("num_hidden_layers", 0) * config.get("hidden_size", 0) * length
        lora = count_lora_parameters(self.base, controls)
        operations = 4 * self._matrix_values + 6 * lora + 3 * attention
        if controls.enable_activation_checkpointing:
            operations += 2 * self._matrix_values + 2 * lora + attention
        return float(training.tokens * operations / self._flops / controls.gpus)

    def _answer(self, evaluation: Evaluation) -> float:
        """Prompts: 2 P operations a token. Answers: a token of a batch reads every weight, or computes with it."""
        sizes = list(self.tasks.values()) or [
            TaskSize((task.limit or TASK_SAMPLES) * (task.epochs or 1), PROMPT_TOKENS, task.max_tokens)
            for task in evaluation.tasks
        ]
        reading = self._model_bytes / (self.device.bandwidth * BANDWIDTH_EFFICIENCY)
        seconds = 0.0
        for size in sizes:
            batch = evaluation.max_connections
            prompts = size.samples * size.prompt_tokens * 2 * self._matrix_values / self._flops
            computing = min(batch, size.samples) * 2 * self._matrix_values / self._flops
            steps = ceil(size.samples / batch) * (size.max_tokens or evaluation.max_tokens or ANSWER_TOKENS)
            seconds += prompts + steps * max(reading, computing)
        return seconds
