"""An evaluation on its way: what it leaves while it runs, so that what was done is not done again.

It lies in `state/eval/` of its point, which is no output of a rule: Snakemake deletes those of a job that failed.

    key.json    which evaluation of which adapter this is; of another one, nothing here is used
    logs/       Inspect's logs by task, finished or not
    data/       what Inspect keeps of samples that are not in a log yet
    done/       the logs and metrics.json, once every task has ended well
    error.txt   why it failed
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import ADAPTER_WEIGHTS, METRICS, STATE
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_record


def is_evaluated(spec: EvaluationSpec, point: Path) -> bool:
    """Whether a point's evaluation, as `spec` says it, lies in its `eval/`; of what adapter is not asked."""
    return _holds_result(point / "eval", _get_names(spec), {"evaluation_sha256": spec.sha256})


class EvaluationState:
    """The state of one point's evaluation as `spec` says it."""

    def __init__(self, spec: EvaluationSpec, point: Path) -> None:
        self._point = point
        self._folder = point / STATE / "eval"
        self._names = _get_names(spec)
        weights = point / "adapter" / ADAPTER_WEIGHTS
        self._key = {
            "evaluation_sha256": spec.sha256,
            "adapter_sha256": digest_file(weights) if spec.mode != "base" and weights.is_file() else None,
        }

    @property
    def data(self) -> Path:
        """Inspect's folder for samples that are not in a log yet."""
        return self._folder / "data"

    def get_log_dir(self, task: str) -> Path:
        """Return the folder of a task's logs, of this attempt and earlier ones."""
        return self._folder / "logs" / task

    def begin(self, versions: Mapping[str, str]) -> None:
        """Make ready to run: keep what an attempt at the same evaluation with the same versions left, and no other."""
        key = {**self._key, "versions": dict(versions)}
        if find_record(self._folder / "key.json") != key:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_record(self._folder / "key.json", key)
        (self._folder / "error.txt").unlink(missing_ok=True)

    def finish(self, logs: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        """Take the log of each task, and the metrics, as the result."""
        done = self._folder / "done"
        done.mkdir(exist_ok=True)
        for task, log in logs.items():
            log.replace(done / f"{task}.eval")
        write_record(done / METRICS, {**metrics, **self._key})
        for folder in ("logs", "data"):
            shutil.rmtree(self._folder / folder, ignore_errors=True)

    def fail(self, reason: str) -> None:
        """Leave word of why there is no result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "error.txt").write_text(reason.strip() + "\n", encoding="utf-8")

    def is_finished(self) -> bool:
        """Whether the result is there, published or not."""
        return self._holds_result(self._folder / "done") or self._holds_result(self._point / "eval")

    def keep(self) -> None:
        """Have a result that is published here too: Snakemake deletes what it is about to make anew."""
        if not self._holds_result(self._folder / "done"):
            _link(self._names, self._point / "eval", self._folder / "done")

    def publish(self) -> None:
        """Put the result into the point's `eval/`, and leave nothing here.

        Raises:
            InputError: there is none, and why.
        """
        if not self._holds_result(self._folder / "done"):
            error = self._folder / "error.txt"
            reason = (
                error.read_text(encoding="utf-8").strip()
                if error.is_file()
                else "it was not evaluated, and left no word"
            )
            raise InputError(f"{self._point.name}: {reason}")
        _link(self._names, self._folder / "done", self._point / "eval")
        shutil.rmtree(self._folder)

    def _holds_result(self, folder: Path) -> bool:
        return _holds_result(folder, self._names, self._key)


def _get_names(spec: EvaluationSpec) -> list[str]:
    """The files of a result, the last of which says that all are there."""
    return [*(f"{task.name}.eval" for task in spec.tasks), METRICS]


def _holds_result(folder: Path, names: list[str], key: Mapping[str, Any]) -> bool:
    metrics = find_record(folder / METRICS)
    is_this = {part: metrics.get(part) for part in key} == key
    return bool(metrics) and is_this and all((folder / name).is_file() for name in names)


def _link(names: list[str], source: Path, target: Path) -> None:
    """Give files a second name, or copy them where the file system has no hard links; the last says that all are."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        aside = target / f".{name}.tmp"
        aside.unlink(missing_ok=True)
        try:
            os.link(source / name, aside)
        except OSError:
            shutil.copyfile(source / name, aside)
        os.utime(aside)
        aside.replace(target / name)
