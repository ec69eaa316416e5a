"""What one evaluation does: the settings that decide its numbers, as one value that can be written and read."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # the environment that evaluates reads specs only, and lacks what makes them
    from collections.abc import Iterable

    from lorasweep.experiment import Experiment
    from lorasweep.tasks import TaskEntry

Mode = Literal["A", "B1", "B2", "base"]
"""How the evaluated model is made: kept in full, merged for the evaluation, base and adapter in memory, or the base."""


class TaskSpec(BaseModel):
    """An Inspect task and its arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: str
    args: dict[str, Any]
    limit: int | None


class EvaluationSpec(BaseModel):
    """Everything that an evaluation's numbers depend on, but the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    base_model: str
    base_fingerprint: str
    dtype: Literal["bf16", "fp32"]
    device: Literal["cuda", "cpu"]
    system_prompt: str | None
    tasks: list[TaskSpec]
    max_connections: int
    max_tokens: int | None
    temperature: float
    seed: int


def make_evaluation_spec(
    experiment: "Experiment", tasks: "Iterable[TaskEntry]", mode: Mode, base_fingerprint: str
) -> EvaluationSpec:
    """Return what the evaluation of a point of this mode depends on."""
    evaluation = experiment.evaluation
    return EvaluationSpec(
        mode=mode,
        base_model=evaluation.base_model or experiment.model.path,
        base_fingerprint=base_fingerprint,
        dtype=experiment.model.dtype,
        device=experiment.model.device,
        system_prompt=experiment.data.system_prompt,
        # In which order a person wrote tasks and arguments makes no other evaluation.
        tasks=[
            TaskSpec(name=t.name, task=t.spec.task, args=dict(sorted(t.spec.args.items())), limit=t.spec.limit)
            for t in sorted(tasks, key=lambda t: t.name)
        ],
        max_connections=evaluation.max_connections,
        max_tokens=evaluation.max_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
    )
