"""Choose the epoch of a training whose adapter is kept, by the scores of all epochs' adapters on a task.

In the training's folder are the adapters of its epochs: `epoch=1` and so on, and `epoch=last`. The best one becomes
`adapter`, with the scores in its record, and those folders are removed. The states of the evaluations are in `state/`,
so that a choice that was killed goes on where it was.
"""

import json
import shutil
from math import isfinite
from pathlib import Path
from typing import Any

from lorasweep.evaluation.evaluate import evaluate_adapters
from lorasweep.evaluation.inspect_tasks import EvaluationError
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.layout import LAST_EPOCH, METRICS, RECORD, STATE, TRAINING_LOG, get_epoch_folder
from lorasweep.trainers.publication import publish
from lorasweep.util.errors import InputError
from lorasweep.util.files import write_record


def choose_epoch(
    spec: EvaluationSpec, training: Path, epochs: int, metric: str | None = None, *, higher_is_better: bool = True
) -> int:
    """Publish the adapter of a training's best epoch as `adapter`; return the epoch, counted from 1.

    `spec` has the task, `epochs` is the number of the training's epochs, and `metric` is written `<score>/<metric>`;
    `None`: the first that Inspect lists. Of equal scores, that of the earliest epoch counts. The record of the adapter
    says under `best_epoch` how it was chosen.

    Raises:
        EvaluationError: an epoch could not be scored, or has no finite score.
        InputError: the base model or the task's file has changed since the run began, or the task has no such metric.
    """
    folders = {epoch: training / get_epoch_folder(epoch) for epoch in range(1, epochs)}
    folders[epochs] = training / LAST_EPOCH
    points = {epoch: _make_point(training, epoch, folder) for epoch, folder in folders.items()}
    if failures := evaluate_adapters(spec, list(points.values())):
        raise EvaluationError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    scores = [read_score(spec, epoch, point, metric) for epoch, point in points.items()]
    sign = 1 if higher_is_better else -1
    best = max(scores, key=lambda score: (sign * score["score"], -score["epoch"]))
    made = training / STATE / "chosen"
    shutil.rmtree(made, ignore_errors=True)
    shutil.copytree(folders[best["epoch"]], made)
    shutil.copyfile(folders[epochs] / TRAINING_LOG, made / TRAINING_LOG)
    choice = {
        "epoch": best["epoch"],
        "epochs_trained": epochs,
        "task": spec.tasks[0].model_dump(mode="json"),
        "metric": best["metric"],
        "higher_is_better": higher_is_better,
        "evaluation_sha256": spec.sha256,
        "score": best["score"],
        "standard_error": best["standard_error"],
        "scores": [{key: value for key, value in score.items() if key != "metric"} for score in scores],
    }
    record = json.loads((made / RECORD).read_text(encoding="utf-8"))
    write_record(made / RECORD, {**record, "best_epoch": choice})
    publish(made, training / "adapter")
    # The last epoch's first: without it, the next run trains again or, from the training's state, publishes all again.
    for folder in reversed(folders.values()):
        shutil.rmtree(folder)
    return int(best["epoch"])


def _make_point(training: Path, epoch: int, folder: Path) -> Path:
    """Return a folder in which an epoch's adapter can be evaluated as if it were a point's."""
    point = training / STATE / "epochs" / f"epoch={epoch}"
    point.mkdir(parents=True, exist_ok=True)
    (point / "adapter").unlink(missing_ok=True)
    (point / "adapter").symlink_to(Path("../../..") / folder.name, target_is_directory=True)
    return point


def read_score(
    spec: EvaluationSpec,
    epoch: int,
    point: Path,
    metric: str | None,
    key: str = "evaluation.validation_task.metric",
) -> dict[str, Any]:
    """Return an epoch's score, with the standard error that Inspect gives for the mean of a score's samples."""
    EvaluationState(spec, point).publish()
    metrics = json.loads((point / "eval" / METRICS).read_text(encoding="utf-8"))
    task = metrics["tasks"][spec.tasks[0].name]
    found = task["scores"]
    chosen = metric or next(iter(found), "")
    if chosen not in found:
        raise InputError(
            f"{key}: {chosen!r} is no metric of the task '{spec.tasks[0].name}'",
            ", ".join(found) or "a task with a scorer",
        )
    score = found[chosen]
    if not isinstance(score, int | float) or not isfinite(score):
        raise EvaluationError(f"epoch {epoch}: {chosen} of '{spec.tasks[0].name}' is {score}, no finite number")
    name, _, kind = chosen.rpartition("/")
    return {
        "epoch": epoch,
        "metric": chosen,
        "score": score,
        "standard_error": found.get(f"{name}/stderr") if kind in ("accuracy", "mean") else None,
        "samples": task["samples"],
        "adapter_sha256": metrics["adapter_sha256"],
    }
