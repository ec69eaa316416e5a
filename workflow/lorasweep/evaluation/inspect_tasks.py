"""Inspect's tasks: how one is loaded, asked otherwise than it says, and run."""

from pathlib import Path
from typing import Any

from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.util.errors import JobError


class EvaluationError(JobError):
    """A task ended in an error, or without all of its samples."""


def make_options(spec: EvaluationSpec, task: TaskSpec, model: Any) -> dict[str, Any]:
    """Make the model ready for a task; return what of Inspect's options the task has of its own.

    They override the model's configuration, and that of the task's own code.
    """
    options: dict[str, Any] = {
        "epochs": task.epochs,
        "max_tokens": task.max_tokens,
        "temperature": task.temperature,
        "system_message": task.system_prompt,
    }
    # The provider `hf` waits 2 s whether further requests fill a batch: with no more samples than one holds, none do.
    if task.limit and (samples := task.limit * (task.epochs or 1)) < spec.max_connections:
        options["max_connections"] = samples
    if spec.backend == "hf":
        temperature = spec.temperature if task.temperature is None else task.temperature
        # What samples says so to the provider, and has a temperature; what does not has none.
        model.api.do_sample = temperature > 0
        model.config = model.config.model_copy(update={"temperature": temperature or None})
        options["temperature"] = task.temperature or None
    if task.solver:
        from inspect_ai.solver import SolverSpec

        options["solver"] = SolverSpec(task.solver, task.solver_args or {}, task.solver_args or {})
    return {key: value for key, value in options.items() if value is not None}


def load_task(spec: EvaluationSpec, task: TaskSpec) -> Any:
    """What Inspect is given as a task: its name; or the task itself, where that alone can be changed."""
    if not task.scorer and not _get_prompt(spec, task):
        return task.task
    from inspect_ai._eval.loader import load_tasks

    (loaded,) = load_tasks([task.task], task.args)
    loaded = with_prompt(spec, task, loaded)
    return _with_scorer(loaded, task) if task.scorer else loaded


def _get_prompt(spec: EvaluationSpec, task: TaskSpec) -> str | None:
    return spec.prompt if task.prompt is None else task.prompt


def with_prompt(spec: EvaluationSpec, task: TaskSpec, loaded: Any) -> Any:
    """Have a task put each sample's input into the template, if there is one, before its solvers see it."""
    template = _get_prompt(spec, task)
    if not template:
        return loaded
    from inspect_ai import task_with
    from inspect_ai.solver import solver

    @solver(name="prompt")  # type: ignore[untyped-decorator]
    def fill(template: str) -> Any:
        async def solve(state: Any, generate: Any) -> Any:
            state.user_prompt.text = template.format(input=state.user_prompt.text)
            return state

        return solve

    setup = loaded.setup if isinstance(loaded.setup, list) else [loaded.setup] if loaded.setup else []
    return task_with(loaded, setup=[fill(template), *setup])


def _with_scorer(loaded: Any, task: TaskSpec) -> Any:
    from inspect_ai import task_with
    from inspect_ai._eval.loader import scorer_from_spec
    from inspect_ai.scorer._scorer import ScorerSpec

    file = task.task.partition("@")[0]
    path = Path(file) if file.endswith(".py") else None
    scorer = scorer_from_spec(ScorerSpec(scorer=str(task.scorer)), path, **(task.scorer_args or {}))
    return task_with(loaded, scorer=scorer)


def run_task(
    spec: EvaluationSpec, task: TaskSpec, model: Any, state: EvaluationState, point: str, metadata: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Run one task, or what an earlier attempt left of it; return its log, and its scores."""
    from inspect_ai import eval_set

    loaded = load_task(spec, task)
    _, [log] = eval_set(
        loaded,
        log_dir=str(state.get_log_dir(task.name).resolve()),
        retry_attempts=1,  # that is, one
        retry_immediate=False,
        model=model,
        task_args=task.args if loaded is task.task else {},
        limit=task.limit,
        **make_options(spec, task, model),
        log_format="eval",
        metadata=metadata,
        tags=[point],
        display="plain",
        score_display=False,
        ctl_server=False,
    )
    if log.status != "success" or log.results is None:
        reason = str(log.error.message if log.error else log.status).strip()
        raise EvaluationError(f"{point}: {task.task} did not succeed: {reason} (its log: {log.location})")
    completed, total = log.results.completed_samples, log.results.total_samples
    if completed != total:
        raise EvaluationError(f"{point}: {task.task} has {completed} of {total} samples (its log: {log.location})")
    scores = {
        f"{_name(score)}/{name}": metric.value for score in log.results.scores for name, metric in score.metrics.items()
    }
    return Path(log.location.removeprefix("file://")), {
        "scores": scores,
        "samples": log.results.completed_samples,
        "seconds": log.stats.started_at and _seconds(log.stats.started_at, log.stats.completed_at),
    }


def _name(score: Any) -> str:
    """A scorer's name, with how a sample's epochs were reduced to one score where that is not their mean."""
    return f"{score.name}[{score.reducer}]" if score.reducer not in (None, "mean") else str(score.name)


def _seconds(start: str, end: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
