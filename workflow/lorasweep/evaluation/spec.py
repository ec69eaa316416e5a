"""What one evaluation does: the settings that decide its numbers, as one value that can be written and read."""

import hashlib
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasweep.util.digest import digest_file

if TYPE_CHECKING:  # the environment that evaluates reads specs only, and lacks what makes them
    from collections.abc import Iterable
    from pathlib import Path

    from lorasweep.experiment.sections import Data, Experiment
    from lorasweep.experiment.tasks import TaskEntry

Mode = Literal["A", "B1", "B2", "base"]
"""How the evaluated model is made: kept in full, merged for the evaluation, base and adapter in memory, or the base."""


_optional: Any = Field(default=None, exclude_if=lambda value: value is None)


class TaskSpec(BaseModel):
    """An Inspect task, its arguments, and what it has in place of the evaluation's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: str
    args: dict[str, Any]
    limit: int | None
    # What follows is written only where the experiment says it: so a spec that lacks it keeps its digest.
    epochs: int | None = _optional
    max_tokens: int | None = _optional
    temperature: float | None = _optional
    system_prompt: str | None = _optional
    prompt: str | None = _optional
    solver: str | None = _optional
    solver_args: dict[str, Any] | None = _optional
    scorer: str | None = _optional
    scorer_args: dict[str, Any] | None = _optional


class EvaluationSpec(BaseModel):
    """Everything that an evaluation's numbers depend on, but the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    backend: Literal["hf", "vllm"] = "hf"
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
    files: dict[str, str]
    """sha256 by the path of each file that the tasks are made of."""

    has_plain_prompts: Literal[True] | None = _optional
    """Whether a prompt is its text alone, although the model may have a chat template."""
    prompt: str | None = _optional
    """A template of the user's turn, with `{input}`."""

    @property
    def sha256(self) -> str:
        """Of the whole, in hexadecimal: two evaluations of one adapter with one digest are the same."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @property
    def base_proof(self) -> dict[str, Any]:
        """What a proof says of the base model."""
        return {"base_model": self.base_model, "base_model_fingerprint": self.base_fingerprint}

    def make_generate_config(self, temperature: float | None) -> Any:
        """Return Inspect's configuration of generation; how a backend is told to decode greedily is its own matter."""
        from inspect_ai.model import GenerateConfig

        return GenerateConfig(
            max_connections=self.max_connections,
            max_tokens=self.max_tokens,
            temperature=temperature,
            seed=self.seed,
            system_message=self.system_prompt,
        )


def make_evaluation_spec(
    experiment: "Experiment",
    tasks: "Iterable[TaskEntry]",
    files: "Iterable[Path]",
    mode: Mode,
    base_fingerprint: str,
    base_model: str | None = None,
    data: "Data | None" = None,
) -> EvaluationSpec:
    """Return what the evaluation of a point of this mode depends on; `files` are those that the tasks are made of.

    `base_model` is another than the experiment's, `data` is the point's.
    """
    evaluation, data = experiment.evaluation, data or experiment.data
    return EvaluationSpec(
        mode=mode,
        backend=evaluation.backend if mode in ("B2", "base") else "hf",
        base_model=base_model or evaluation.base_model or experiment.model.path,
        base_fingerprint=base_fingerprint,
        dtype=experiment.model.dtype,
        device=experiment.model.device,
        system_prompt=data.system_prompt,
        # In which order a person wrote tasks and arguments makes no other evaluation.
        tasks=[_make_task_spec(t) for t in sorted(tasks, key=lambda t: t.name)],
        max_connections=evaluation.max_connections,
        max_tokens=evaluation.max_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
        files={str(file): digest_file(file) for file in sorted(files)},
        has_plain_prompts=True if data.format == "completion" else None,
        prompt=data.prompt,
    )


def _make_task_spec(entry: "TaskEntry") -> TaskSpec:
    task = entry.spec
    return TaskSpec(
        name=entry.name,
        task=task.task,
        args=_sort(task.args),
        limit=task.limit,
        epochs=task.epochs,
        max_tokens=task.max_tokens,
        temperature=task.temperature,
        system_prompt=task.system_prompt,
        prompt=task.prompt,
        solver=task.solver,
        solver_args=_sort(task.solver_args) if task.solver else None,
        scorer=task.scorer,
        scorer_args=_sort(task.scorer_args) if task.scorer else None,
    )


def _sort(args: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(args.items()))
