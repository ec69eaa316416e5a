"""Estimate how long the jobs of a sweep take: a cost model, corrected by the durations of earlier jobs.

The model counts floating point operations and bytes, and divides them by the device's rates; docs/plan.md has the
formulas. Resource requests to a scheduler, which include a margin, are in lorasweep.sweep.resources.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from lorasweep.checkpoints.architecture import get_architecture
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.dtypes import BYTES
from lorasweep.checkpoints.lora import count_lora_parameters
from lorasweep.checkpoints.sizes import get_model_folder_size, get_tokenizer_size
from lorasweep.experiment.devices import get_device, get_device_name
from lorasweep.experiment.points import Baseline, Point
from lorasweep.experiment.sections import Controls, Data, Device, Experiment, Model
from lorasweep.experiment.task_choice import list_tasks
from lorasweep.planning.lengths import Lengths, Sequences
from lorasweep.stages import TASK_RULES, TRAINER_RULES
from lorasweep.sweep.resources import get_effective_batch, get_evaluation_gpus

BANDWIDTH_EFFICIENCY = 0.5
"""Share of the device's memory bandwidth that decoding reaches."""

START_SECONDS = 15.0
"""Seconds from the start of a job that imports a framework to the first byte of the model."""

ADOPT_SECONDS = 10.0
"""Seconds of a job that checks an adapter and copies it."""

DISK_BANDWIDTH = 1e9
"""Bytes per second at which a model is read or written."""

PROMPT_TOKENS = 256
"""Assumed tokens of an evaluation's prompt, if the task's samples were not counted."""

TEMPLATE_TOKENS = 32
"""Tokens that a chat template and a system prompt add to a prompt."""

ANSWER_TOKENS = 256
"""Assumed tokens of an answer without a `max_tokens` limit."""

TASK_SAMPLES = 1000
"""Assumed samples of a task without a `limit`, if they were not counted."""

ALIKE = {"train_part": "train", "prune": "evaluate_adapters"}
"""The rule whose correction another has as long as it has none of its own: their jobs do the same work."""


@dataclass(frozen=True)
class TaskSize:
    """The workload of an evaluation task."""

    samples: int
    """Number of answers: samples times epochs."""
    prompt_tokens: float
    """Mean tokens of a prompt."""
    max_tokens: int | None = None
    """The task's own limit on the tokens of an answer."""


@dataclass(frozen=True)
class Training:
    """The workload of a training, over all its epochs."""

    steps: int
    """Number of optimizer steps."""
    tokens: int


@dataclass(frozen=True, eq=False)
class Base:
    """A model on which points are trained and evaluated, or a baseline."""

    model: Model
    checkpoint: Checkpoint
    """Its headers; without weights, its tensors' shapes."""
    fingerprint: str = ""
    """The checkpoint's; empty if its weights are missing."""

    @cached_property
    def folder_bytes(self) -> int:
        """Bytes of a full model's folder."""
        return get_model_folder_size(self.checkpoint, self.model.dtype)

    @cached_property
    def tokenizer_bytes(self) -> int:
        """Bytes of the tokenizer's files."""
        return get_tokenizer_size(self.checkpoint)


@dataclass(frozen=True)
class Costs:
    """Expected durations of the jobs of an experiment on one base model."""

    experiment: Experiment
    base: Base
    data: Lengths
    """Lengths of the samples of the first point that is trained."""
    tasks: Mapping[str, TaskSize] = field(default_factory=dict)
    """Sizes of the tasks, by name, in the order of the experiment: counted or guessed."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Correction by rule: the ratio of actual to modelled time of earlier jobs."""
    others: Mapping[Data, Lengths] = field(default_factory=dict)
    """Lengths of the samples by the data sections of the points that are trained."""
    are_tasks_counted: bool = True
    validation: TaskSize | None = None
    """Size of the task that chooses the epoch of each training, or the trainings that go on, if one does."""

    @cached_property
    def device_name(self) -> str:
        return get_device_name(self.experiment)

    @cached_property
    def device(self) -> Device:
        return get_device(self.experiment)

    @cached_property
    def _flops(self) -> float:
        device = self.device
        peak = device.fp32_flops if self.base.model.dtype == "fp32" else device.bf16_flops
        return peak * self.experiment.plan.efficiency

    @cached_property
    def _matrix_values(self) -> int:
        """Number of parameters in matrix products: all but idle experts and embeddings not tied to the head."""
        return get_architecture(self.base.checkpoint).matrix_values

    @cached_property
    def _model_bytes(self) -> int:
        return self.base.checkpoint.num_parameters * BYTES[self.base.model.dtype]

    def get_training(self, controls: Controls, data: Data | None = None) -> Training:
        """Return the steps and tokens of a training. Incomplete batches are dropped, as by the trainer.

        `data` is the data section of the training's point.
        """
        count, mean = self._get_sequences(controls, data)
        # Every GPU gets the same number of samples, so some samples are seen twice.
        batches = ceil(count / controls.gpus) // controls.batch_size
        steps = batches // controls.gradient_accumulation_steps
        if controls.max_steps_per_epoch:
            steps = min(steps, controls.max_steps_per_epoch)
        seen = steps * get_effective_batch(controls) * controls.epochs
        return Training(steps * controls.epochs, round(seen * mean))

    def _get_sequences(self, controls: Controls, data: Data | None) -> Sequences:
        lengths = self.others.get(data, self.data) if data and self.others else self.data
        return lengths.get_sequences(controls)

    def model(self, rule: str, points: Sequence[Point | Baseline]) -> float:
        """Return a job's modelled duration in seconds."""
        if rule == "adopt":
            return ADOPT_SECONDS
        load = START_SECONDS + self._model_bytes / DISK_BANDWIDTH
        if rule in TRAINER_RULES:
            return load + sum(self._train(point) for point in points if isinstance(point, Point))
        merge = 2 * self._model_bytes / DISK_BANDWIDTH
        if rule in ("merge", "export"):
            return START_SECONDS + merge
        if rule == "choose_epoch":
            return load + sum(self._choose(point) for point in points if isinstance(point, Point))
        if rule == "prune":
            return load + len(points) * self._answer_task(self.validation) if self.validation else 0.0
        return load + sum(map(self._answer, points))

    def model_share(self, rule: str, points: Sequence[Point | Baseline], share: float) -> float:
        """Return the modelled duration in seconds of a job that does a share of its work: its load is whole."""
        load = self.model(rule, [])
        return load + share * (self.model(rule, points) - load)

    @property
    def are_tokens_counted(self) -> bool:
        """Whether the tokens of all trainings were counted, not guessed."""
        return all(lengths.are_counted for lengths in (self.data, *self.others.values()))

    def is_counted(self, rule: str) -> bool:
        """Whether the workload behind a rule's time was counted, not guessed."""
        if rule in TRAINER_RULES:
            return self.are_tokens_counted
        return self.are_tasks_counted or rule not in TASK_RULES

    def estimate(self, rule: str, points: Sequence[Point | Baseline]) -> float:
        """Return a job's expected duration in seconds: the modelled one times the rule's correction."""
        return self.model(rule, points) * self._get_factor(rule)

    def estimate_part(self, rule: str, point: Point, begin: int, end: int) -> float:
        """Return the expected seconds of a training's job that trains from the end of an epoch to that of another."""
        return self.model_share(rule, [point], (end - begin) / point.controls.epochs) * self._get_factor(rule)

    def _get_factor(self, rule: str) -> float:
        return self.factors.get(rule, self.factors.get(ALIKE.get(rule, rule), 1.0))

    def _train(self, point: Point) -> float:
        """Return the modelled seconds of a training, without the load of the model.

        Operations per token: 4 P + 6 P_lora, and 6 L h s for attention; activation checkpointing adds a second forward
        pass. The GPUs share all operations; communication is neglected.

        4 P is 2 P forward and 2 P for the gradients of activations: LoRA needs no gradients of the base weights
        (Hu et al. 2021, arXiv:2106.09685). Causal attention over s tokens takes 2 L h s forward, and twice that
        backward.
        """
        controls = point.controls
        training = self.get_training(controls, point.data)
        length = self._get_sequences(controls, point.data).mean
        architecture = get_architecture(self.base.checkpoint)
        attention = 2 * architecture.num_layers * architecture.hidden_size * length
        lora = count_lora_parameters(self.base.checkpoint, controls)
        operations = 4 * self._matrix_values + 6 * lora + 3 * attention
        if controls.enable_activation_checkpointing:
            operations += 2 * self._matrix_values + 2 * lora + attention
        return float(training.tokens * operations / self._flops / controls.gpus)

    def _answer(self, point: Point | Baseline) -> float:
        """Return the modelled seconds of all answers to the tasks of a point or a baseline."""
        return sum(self._answer_task(self.tasks[name]) for name in list_tasks(self.tasks, point))

    def _choose(self, point: Point) -> float:
        """Return the modelled seconds of the answers of all epochs to the task that chooses one of them."""
        return point.controls.epochs * self._answer_task(self.validation) if self.validation else 0.0

    def _answer_task(self, size: TaskSize) -> float:
        """Return the modelled seconds of one model's answers to a task.

        Prompts take 2 P operations per token. An answer's token takes the longer of reading all weights once and
        computing with them for the whole batch. vLLM's GPUs share both; those of `hf` hold layers that take turns.
        """
        evaluation = self.experiment.evaluation
        reading = self._model_bytes / (self.device.bandwidth * BANDWIDTH_EFFICIENCY)
        batch = evaluation.max_connections
        prompts = size.samples * size.prompt_tokens * 2 * self._matrix_values / self._flops
        computing = min(batch, size.samples) * 2 * self._matrix_values / self._flops
        steps = ceil(size.samples / batch) * (size.max_tokens or evaluation.max_tokens or ANSWER_TOKENS)
        is_split = evaluation.backend == "vllm"
        gpus = get_evaluation_gpus(self.base.checkpoint, self.base.model, self.experiment) if is_split else 1
        return (prompts + steps * max(reading, computing)) / gpus
