"""Inspect tasks: load a task, override its settings, run it."""

import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from lorasweep.evaluation.prompts import begin_answers
from lorasweep.evaluation.roles import open_roles
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.evaluation.system_messages import hold_to_rule
from lorasweep.util.errors import JobError

# Tasks are loaded from folders of the user's, which may be shared: no `__pycache__` is left there.
sys.dont_write_bytecode = True


class EvaluationError(JobError):
    """A task failed, or did not complete all of its samples."""


def make_options(spec: EvaluationSpec, task: TaskSpec, model: Any) -> dict[str, Any]:
    """Set up the model for a task, and return the task's own options for Inspect.

    These options override the configuration of the model and of the task's code.
    """
    from lorasweep.evaluation.answer_cache import switch_off_cache

    options: dict[str, Any] = {
        "epochs": task.epochs,
        "max_tokens": task.max_tokens,
        "temperature": task.temperature,
        # Over that of the task's own configuration. "" leaves the task what it brings.
        "system_message": task.system_prompt or None,
    }
    switch_off_cache(model)
    hold_to_rule(model, spec, task)
    begin_answers(model, spec, task)
    # The provider `hf` waits up to 2 s for a full batch, in vain if the task has fewer samples than a batch holds.
    if task.limit and (samples := task.limit * (task.epochs or 1)) < spec.max_connections:
        options["max_connections"] = samples
    if spec.backend == "hf":
        temperature = spec.temperature if task.temperature is None else task.temperature
        # transformers wants do_sample with a temperature, or neither.
        model.api.do_sample = temperature > 0
        model.config = model.config.model_copy(update={"temperature": temperature or None})
        options["temperature"] = task.temperature or None
    if task.solver:
        from inspect_ai.solver import SolverSpec

        options["solver"] = SolverSpec(task.solver, task.solver_args or {}, task.solver_args or {})
    return {key: value for key, value in options.items() if value is not None}


def load_task(spec: EvaluationSpec, task: TaskSpec) -> Any:
    """Return the task for Inspect: its name, or the loaded task if its prompt or scorer must be replaced."""
    if not task.scorer and not _get_prompt(spec, task):
        return task.task
    from inspect_ai._eval.loader import load_tasks

    (loaded,) = load_tasks([task.task], task.args)
    loaded = with_prompt(spec, task, loaded)
    return _with_scorer(loaded, task) if task.scorer else loaded


def stand_in_for_models(roles: Iterable[str]) -> None:
    """Let tasks that ask for a model when they are loaded have one that answers nothing; the same for roles."""
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.model._model import init_active_model, init_model_roles

    model = get_model("mockllm/model")
    init_active_model(model, GenerateConfig())
    init_model_roles(dict.fromkeys(roles, model))


def load_parts(task: TaskSpec) -> Any:
    """Load a task, with the solver and the scorer that replace its own.

    Raises:
        TypeError: a registered task does not have one of the arguments, of which Inspect only warns.
    """
    from inspect_ai import task_with
    from inspect_ai._eval.loader import load_tasks, solver_from_spec
    from inspect_ai._util.registry import registry_lookup
    from inspect_ai.solver import SolverSpec

    if registered := registry_lookup("task", task.task):
        inspect.signature(cast(Any, registered)).bind_partial(**task.args)
    (loaded,) = load_tasks([task.task], task.args)
    if task.solver:
        arguments = task.solver_args or {}
        loaded = task_with(loaded, solver=solver_from_spec(SolverSpec(task.solver, arguments, arguments)))
    return _with_scorer(loaded, task) if task.scorer else loaded


def name_metrics(task: Any) -> list[str] | None:
    """Return the names of a loaded task's metrics, as in the table; `None` if only the scores tell them.

    The latter holds for metrics whose value may be a mapping, and for those of all keys of a score.
    """
    from inspect_ai._eval.task.results import _flatten_metrics, eval_results
    from inspect_ai._util.registry import registry_info
    from inspect_ai.scorer._scorer import scorer_metrics

    for metrics in map(scorer_metrics, task.scorer or []):
        groups = [metrics] if isinstance(metrics, dict) else [part for part in metrics if isinstance(part, dict)]
        names = [registry_info(metric).name for metric in _flatten_metrics(metrics)]
        if any(not name.startswith("inspect_ai/") or name == "inspect_ai/grouped" for name in names):
            return None
        if any("*" in key or "?" in key for group in groups for key in group):
            return None
    results, _ = eval_results(0, [], task.epochs_reducer, task.scorer, task.metrics)
    return [f"{_name(score)}/{name}" for score in results.scores for name in score.metrics] or None


def list_scores(task: Any) -> list[tuple[str, str]]:
    """Return the scores of a loaded task, each with its scorer's name, as far as they are known before it runs."""
    from inspect_ai._util.registry import registry_unqualified_name
    from inspect_ai.scorer._scorer import scorer_metrics, unique_scorer_name

    scores: list[tuple[str, str]] = []
    names: list[str] = []
    for scorer in task.scorer or []:
        names.append(unique_scorer_name(registry_unqualified_name(scorer), names))
        metrics = scorer_metrics(scorer)
        for part in [metrics] if isinstance(metrics, dict) else metrics:
            keys = [key for key in part if not {*"*?["} & {*key}] if isinstance(part, dict) else names[-1:]
            scores += [(key, names[-1]) for key in keys]
    return scores


def find_shared_score(scores: Iterable[tuple[str, str]]) -> str | None:
    """Return which score two scorers of a task give; `None` if there is none.

    One would replace the other or, where they have other metrics, the samples' scores of both would be taken for one.
    """
    scorers: dict[str, str] = {}
    for score, scorer in scores:
        if scorers.setdefault(score, scorer) != scorer:
            return f"its scorers {scorers[score]} and {scorer} both give the score '{score}'"
    return None


def _get_prompt(spec: EvaluationSpec, task: TaskSpec) -> str | None:
    return spec.prompt if task.prompt is None else task.prompt


def with_prompt(spec: EvaluationSpec, task: TaskSpec, loaded: Any) -> Any:
    """Return the task with a setup step that puts each sample's input into the prompt template, if there is one."""
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
    spec: EvaluationSpec, task: TaskSpec, model: Any, log_dir: Path, point: str, metadata: dict[str, Any]
) -> tuple[Path, dict[str, Any]]:
    """Run or resume one task. Return its log's path, and its scores with sample count and seconds.

    `log_dir` is the folder of the task's logs, from this attempt and earlier ones.

    Raises:
        EvaluationError: the task failed, did not complete all of its samples, or two of its scorers give one score.
    """
    from inspect_ai import eval_set

    loaded = load_task(spec, task)
    _, [log] = eval_set(
        loaded,
        log_dir=str(log_dir.resolve()),
        # A log of a model that was elsewhere is not continued: else Inspect would refuse the folder.
        log_dir_allow_dirty=True,
        retry_attempts=1,  # one attempt in all
        retry_immediate=False,
        # Whatever the task allows: a log that lacks samples must be one that is continued.
        fail_on_error=True,
        model=model,
        model_roles=open_roles(spec) or None,
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
        raise EvaluationError(f"{point}: {task.task} failed: {reason} (log: {log.location})")
    completed, total = log.results.completed_samples, log.results.total_samples
    if completed != total:
        raise EvaluationError(f"{point}: {task.task} completed {completed} of {total} samples (log: {log.location})")
    if shared := find_shared_score((score.name, score.scorer) for score in log.results.scores):
        raise EvaluationError(f"{point}: {task.task}: {shared} (log: {log.location})")
    scores = {
        f"{_name(score)}/{name}": metric.value for score in log.results.scores for name, metric in score.metrics.items()
    }
    return Path(log.location.removeprefix("file://")), {
        "scores": scores,
        "samples": log.results.completed_samples,
        "seconds": log.stats.started_at and _seconds(log.stats.started_at, log.stats.completed_at),
    }


def _name(score: Any) -> str:
    """Return a scorer's name; with the reducer of a sample's epochs, unless that is the mean."""
    return f"{score.name}[{score.reducer}]" if score.reducer not in (None, "mean") else str(score.name)


def _seconds(start: str, end: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
