"""The specification of an evaluation: all settings that determine its results, as one serializable value."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.chat_template import find_given_template, has_date, read_chat_template, read_kept_template
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.roles import get_folders
from lorasweep.layout import ADAPTER_WEIGHTS
from lorasweep.util.digest import digest_file, digest_text

if TYPE_CHECKING:  # the evaluation environment only reads specs, and lacks the dependencies of these modules
    from collections.abc import Iterable

    from lorasweep.experiment.sections import Base, Data, Experiment, Model, ModelRole
    from lorasweep.experiment.tasks import TaskEntry

Mode = Literal["A", "B1", "B2", "base"]
"""The evaluated model: a kept full model, one merged for the evaluation, base and adapter in memory, or the base."""

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `--max-lora-rank` (vllm/config/lora.py). Other ranks need the next larger value."""

_optional: Any = Field(default=None, exclude_if=lambda value: value is None)


class TaskSpec(BaseModel):
    """An Inspect task, its arguments, and its overrides of the evaluation's settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    task: str
    args: dict[str, Any]
    limit: int | None
    # Written only if the experiment sets them, so that a spec without them keeps its digest.
    epochs: int | None = _optional
    max_tokens: int | None = _optional
    temperature: float | None = _optional
    system_prompt: str | None = _optional
    prompt: str | None = _optional
    assistant_prefix: str | None = _optional
    solver: str | None = _optional
    solver_args: dict[str, Any] | None = _optional
    scorer: str | None = _optional
    scorer_args: dict[str, Any] | None = _optional


class RoleSpec(BaseModel):
    """The model of one of Inspect's roles."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    config: dict[str, Any]
    args: dict[str, Any]
    base_url: str | None = _optional
    fingerprint: str | None = _optional
    """Of a local model: its checkpoint's fingerprint, and the digests of its adapter."""


class EvaluationSpec(BaseModel):
    """Everything that an evaluation's results depend on, except the adapter's weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode
    backend: Literal["hf", "vllm"] = "hf"
    base_model: str
    base_fingerprint: str
    dtype: Literal["bf16", "fp16", "fp32"]
    device: Literal["cuda", "cpu"]
    system_prompt: str | None
    tasks: list[TaskSpec]
    max_connections: int
    max_tokens: int | None
    temperature: float
    seed: int
    files: dict[str, str]
    """sha256 of each of the tasks' source files, by path."""

    has_plain_prompts: Literal[True] | None = _optional
    """Whether prompts are plain text, even if the model has a chat template."""
    chat_template: str | None = _optional
    """The text of a chat template that replaces the base model's own."""
    prompt: str | None = _optional
    """A template of the user's message, with `{input}`."""
    template_date: str | None = _optional
    """The date that chat templates write, as YYYY-MM-DD; only if the model's or a role's template writes one."""
    quantize: Literal["nf4", "int8"] | None = _optional
    """How the base model is quantized in memory; `None`: it is not."""
    model_roles: dict[str, RoleSpec] | None = _optional
    """The models that tasks ask for by role."""
    gpus: int = Field(default=1, exclude=True)
    """Number of GPUs that hold the model. Not a part of the evaluation: it changes where the weights are, not them."""

    @property
    def placement(self) -> str:
        """Where transformers puts a model: its layers are spread over several GPUs, as evenly as they fit."""
        return "cpu" if self.device == "cpu" else "cuda:0" if self.gpus <= 1 else "auto"

    @property
    def sha256(self) -> str:
        """sha256 of the spec, without the path of the base model, which the fingerprint identifies.

        Two evaluations of the same adapter with the same digest are identical.
        """
        return hashlib.sha256(self.model_dump_json(exclude={"base_model"}).encode()).hexdigest()

    @property
    def base_proof(self) -> dict[str, Any]:
        """The part of an adapter's proof that identifies the base model."""
        return {"base_model": self.base_model, "base_model_fingerprint": self.base_fingerprint}

    def make_generate_config(self, temperature: float | None) -> Any:
        """Return Inspect's generation configuration. Backends differ in the `temperature` of greedy decoding."""
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
    model: "Model",
    data: "Data",
    base: "Base" = "full",
) -> EvaluationSpec:
    """Return the spec of an evaluation in this mode; `files` are the tasks' source files.

    `model` is the base model, `data` the section of the point. `base` is as `evaluation.base`.
    """
    evaluation = experiment.evaluation
    given = find_given_template(model, data)
    asked = given if given is not None or data.format == "completion" else read_chat_template(Path(model.path))
    templates = [asked, *map(_find_role_template, evaluation.model_roles.values())]
    return EvaluationSpec(
        mode=mode,
        backend=evaluation.backend if mode in ("B2", "base") else "hf",
        base_model=model.path,
        base_fingerprint=base_fingerprint,
        dtype=model.dtype,
        device=model.device,
        system_prompt=data.system_prompt,
        # Sorted: the order of tasks and arguments in the file must not change the digest.
        tasks=[make_task_spec(t) for t in sorted(tasks, key=lambda t: t.name)],
        max_connections=evaluation.max_connections,
        max_tokens=evaluation.max_tokens,
        temperature=evaluation.temperature,
        seed=evaluation.seed,
        files={str(file): digest_file(file) for file in sorted(files)},
        has_plain_prompts=True if data.format == "completion" else None,
        chat_template=given,
        prompt=data.prompt,
        template_date=data.template_date if any(map(has_date, templates)) else None,
        quantize=model.quantize if base == "quantized" else None,
        model_roles={name: _make_role_spec(role) for name, role in sorted(evaluation.model_roles.items())} or None,
    )


def _find_role_template(role: "ModelRole") -> str | None:
    """Return the chat template by which a role's local model is asked; `None` if it has none, or is not local."""
    folder, adapter = get_folders(role.model, role.args)
    kept = read_kept_template(Path(adapter)) if adapter else None
    return kept if kept is not None or not folder else read_chat_template(Path(folder))


def fingerprint_role(role: "ModelRole | RoleSpec") -> str | None:
    """Return what identifies a role's local model: its weights, and a chat template that replaces the base's.

    `None` for any other model.
    """
    folder, adapter = get_folders(role.model, role.args)
    if not folder:
        return None
    parts = [read_checkpoint(Path(folder)).fingerprint]
    if adapter:
        kept = read_kept_template(Path(adapter))
        parts += [digest_file(Path(adapter, ADAPTER_WEIGHTS)), digest_config(Path(adapter))]
        parts += [] if kept is None else [digest_text(kept)]
    return " ".join(parts)


def _make_role_spec(role: "ModelRole") -> RoleSpec:
    return RoleSpec(
        model=role.model,
        config=_sort(role.config),
        args=_sort(role.args),
        base_url=role.base_url,
        fingerprint=fingerprint_role(role),
    )


def make_task_spec(entry: "TaskEntry") -> TaskSpec:
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
        assistant_prefix=task.assistant_prefix,
        solver=task.solver,
        solver_args=_sort(task.solver_args) if task.solver else None,
        scorer=task.scorer,
        scorer_args=_sort(task.scorer_args) if task.scorer else None,
    )


def _sort(args: dict[str, Any]) -> dict[str, Any]:
    return dict(sorted(args.items()))
