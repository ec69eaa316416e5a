"""The state of a running evaluation, kept so that an interrupted evaluation resumes.

The state is in the point's `state/eval/`. This folder is not an output of a rule, as Snakemake deletes the outputs of a
failed job.

    key.json    the evaluation and the adapter that the state belongs to; the state of another one is discarded
    logs/       Inspect's logs by task, finished or not
    data/       Inspect's data of samples that are not in a log yet
    done/       the logs and metrics.json, once every task has succeeded
    error.txt   the reason of a failure
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.adapters.identity import digest_config, identify_adapter
from lorasweep.evaluation.reproduce import write_reproduction
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import ADAPTER_WEIGHTS, CHANGED_MEANWHILE, METRICS, RECORD, STATE
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_record


def is_evaluated(spec: EvaluationSpec, point: Path) -> bool:
    """Whether the point's `eval/` holds a complete result for this spec and the adapter in the point's record."""
    adapter = {"adapter_sha256": None, **identify_adapter(find_record(point / "adapter" / RECORD))}
    return _holds_result(point / "eval", _get_names(spec), {"evaluation_sha256": spec.sha256, **adapter})


class EvaluationState:
    """The state of one point's evaluation by one spec."""

    def __init__(self, spec: EvaluationSpec, point: Path) -> None:
        self._spec = spec
        self._point = point
        self._folder = point / STATE / "eval"
        self._names = _get_names(spec)
        adapter = point / "adapter"
        has_adapter = spec.mode != "base" and (adapter / ADAPTER_WEIGHTS).is_file()
        self._key = {
            "evaluation_sha256": spec.sha256,
            "adapter_sha256": digest_file(adapter / ADAPTER_WEIGHTS) if has_adapter else None,
        }
        if has_adapter and "adapter_config_sha256" in identify_adapter(find_record(adapter / RECORD)):
            self._key["adapter_config_sha256"] = digest_config(adapter)

    @property
    def data(self) -> Path:
        """Inspect's folder for samples that are not in a log yet."""
        return self._folder / "data"

    def get_log_dir(self, task: str) -> Path:
        """Return the folder of a task's logs from this attempt and earlier ones."""
        return self._folder / "logs" / task

    def begin(self, versions: Mapping[str, str]) -> None:
        """Prepare a run: keep an earlier attempt's state if its key and versions are the same, else discard it.

        Write the page that runs this evaluation again.
        """
        key = {**self._key, "versions": dict(versions)}
        if find_record(self._folder / "key.json") != key:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            write_record(self._folder / "key.json", key)
        (self._folder / "error.txt").unlink(missing_ok=True)
        write_reproduction(self._spec, self._point, versions)

    def finish(self, logs: Mapping[str, Path], metrics: Mapping[str, Any]) -> None:
        """Store the log of each task, and the metrics, as the result."""
        done = self._folder / "done"
        done.mkdir(exist_ok=True)
        for task, log in logs.items():
            log.replace(done / f"{task}.eval")
        # Unsorted: a task's first metric decides.
        write_record(done / METRICS, {**metrics, **self._key}, sorts=False)
        for folder in ("logs", "data"):
            shutil.rmtree(self._folder / folder, ignore_errors=True)

    def discard(self) -> None:
        """Remove the state, with a result that was not published."""
        shutil.rmtree(self._folder)

    def fail(self, reason: str) -> None:
        """Record why there is no result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "error.txt").write_text(reason.strip() + "\n", encoding="utf-8")

    def is_finished(self) -> bool:
        """Whether a complete result exists, published or not."""
        return self._holds_result(self._folder / "done") or self._holds_result(self._point / "eval")

    def keep(self) -> None:
        """Copy a published result back into the state, as Snakemake deletes a job's outputs before rerunning it."""
        if not self._holds_result(self._folder / "done"):
            _link(self._names, self._point / "eval", self._folder / "done")

    def publish(self) -> None:
        """Move the result to the point's `eval/`, and remove the state.

        Raises:
            InputError: there is no result; the message has the reason.
        """
        if not self._holds_result(self._folder / "done"):
            error = self._folder / "error.txt"
            if error.is_file():
                reason = error.read_text(encoding="utf-8").strip()
            elif (self._folder / "done" / METRICS).is_file():
                reason = CHANGED_MEANWHILE
            else:
                reason = "it was not evaluated, and no reason was recorded"
            raise InputError(f"{self._point.name}: {reason}")
        _link(self._names, self._folder / "done", self._point / "eval")
        shutil.rmtree(self._folder)

    def _holds_result(self, folder: Path) -> bool:
        return _holds_result(folder, self._names, self._key)


def _get_names(spec: EvaluationSpec) -> list[str]:
    """Return the names of a result's files. The last is written last: its presence marks the result as complete."""
    return [*(f"{task.name}.eval" for task in spec.tasks), METRICS]


def _holds_result(folder: Path, names: list[str], key: Mapping[str, Any]) -> bool:
    metrics = find_record(folder / METRICS)
    is_this = {part: metrics.get(part) for part in key} == key
    return bool(metrics) and is_this and all((folder / name).is_file() for name in names)


def _link(names: list[str], source: Path, target: Path) -> None:
    """Hard-link files into `target`, or copy them if the file system has no hard links; the last name comes last."""
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
