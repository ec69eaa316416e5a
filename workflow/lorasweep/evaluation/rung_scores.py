"""Score the adapters of trainings in a race (`prune`) on a task, on one loaded base model.

The states of the evaluations are in `state/rungs/` of each training, so that a killed job goes on where it was.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.evaluation.epoch_choice import read_score
from lorasweep.evaluation.evaluate import evaluate_adapters
from lorasweep.evaluation.inspect_tasks import EvaluationError
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import STATE, get_rung_name


def score_rungs(
    spec: EvaluationSpec, adapters: Mapping[Path, Path], after: int, metric: str | None
) -> dict[Path, dict[str, Any]]:
    """Return the scores of trainings after an epoch, by the training's folder; `adapters` are those of their adapters.

    `spec` has the task, and `metric` is written `<score>/<metric>`; `None`: the first that Inspect lists.

    Raises:
        EvaluationError: an adapter could not be scored, or has no finite score.
        InputError: the base model or the task's file has changed since the run began, or the task has no such metric.
    """
    points = {training: _make_point(training, adapter, after) for training, adapter in adapters.items()}
    if failures := evaluate_adapters(spec, list(points.values())):
        raise EvaluationError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    scores = {}
    for training, point in points.items():
        scores[training] = read_score(spec, after, point, metric, "prune.by.metric") | {
            "evaluation_sha256": spec.sha256,
            "asked_metric": metric,
        }
    return scores


def drop_states(training: Path) -> None:
    """Remove the states of a training's evaluations, once their scores are kept."""
    shutil.rmtree(training / STATE / "rungs", ignore_errors=True)


def _make_point(training: Path, adapter: Path, after: int) -> Path:
    """Return a folder in which an adapter can be evaluated as if it were a point's."""
    point = training / STATE / "rungs" / f"{training.name}__{get_rung_name(after)}"
    point.mkdir(parents=True, exist_ok=True)
    (point / "adapter").unlink(missing_ok=True)
    (point / "adapter").symlink_to(adapter.resolve(), target_is_directory=True)
    return point
