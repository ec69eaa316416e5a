"""The merged models of a run (mode B1): their folder, and the removal of those that no job will read."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from lorasweep.running.events import find_failed_job
from lorasweep.util.errors import InputError


class MergedModels(logging.Handler):
    """Remove the merged model of a point whose merge or evaluation has failed for good, from Snakemake's messages.

    Snakemake deletes a merged model after its evaluation. One that was merged for an evaluation that fails would stay.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is the experiment's folder of merged models, in a folder that has nothing else."""
        super().__init__()
        self._folder = folder
        self._link = folder.parent
        key = hashlib.sha256(str(self._link.absolute()).encode()).hexdigest()[:8]
        self._name = f"lorasweep-{self._link.parent.name}-{key}"  # of the link's target
        self._retries = 0
        self._points: dict[int, str] = {}
        self._failures: dict[int, int] = {}

    def expect_retries(self, retries: int) -> None:
        """Set the number of times that a failed job is started again."""
        self._retries = retries

    def prepare(self, elsewhere: str | None) -> None:
        """Have the models be in the results folder or `elsewhere`, an existing directory that all nodes see.

        Models that a killed run left, which this run evaluates, move there. The unfinished ones are removed.

        Raises:
            InputError: the directory does not exist or cannot be written to, or the models are another folder's.
        """
        link, old = self._link, Path(os.path.realpath(self._link))
        if link.is_symlink() and old.name != self._name:
            raise InputError(
                f"'{link}' leads to {old}, the merged models of the folder that '{link.parent}' was copied or moved "
                f"from: remove the link, and run again"
            )
        for partial in self._folder.glob(".*.partial"):
            shutil.rmtree(partial)
        if not (self._folder.is_dir() and any(self._folder.iterdir())):
            self.remove_all()
        new = Path(os.path.realpath(elsewhere or link.parent), self._name if elsewhere else link.name)
        if old == new and old.exists():
            return
        if elsewhere and not Path(elsewhere).is_dir():
            raise InputError(
                f"evaluation.merged_models_in: {elsewhere!r} is not a directory",
                "a directory that exists and that all nodes see, or null",
            )
        try:
            if link.is_symlink():
                link.unlink()
            if elsewhere and new.exists():
                shutil.rmtree(new)
            if old.exists():
                shutil.move(old, new)
            elif elsewhere:
                new.mkdir()
            if elsewhere:
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(new)
        except OSError as error:
            raise InputError(
                f"evaluation.merged_models_in: {elsewhere!r} cannot be written to ({error.strerror})",
                "a directory that all nodes can write to, or null",
            ) from error

    def emit(self, record: logging.LogRecord) -> None:
        """Count the failures of a job, and remove its model after the last one."""
        fields = record.__dict__
        if str(fields.get("event", "")) == "job_info" and fields["rule_name"] in ("merge", "evaluate"):
            self._points[fields["jobid"]] = str(next(iter(fields["wildcards"].values())))
        job = find_failed_job(record)
        if job is None or job not in self._points:
            return
        self._failures[job] = self._failures.get(job, 0) + 1
        # What a killed merge has written is of no use to its retry.
        shutil.rmtree(self._folder / f".{self._points[job]}.partial", ignore_errors=True)
        if self._failures[job] > self._retries:
            shutil.rmtree(self._folder / self._points[job], ignore_errors=True)

    def remove_all(self) -> None:
        """Remove all merged models, their folder and its parent. Those of another folder stay, without the link."""
        target = Path(os.path.realpath(self._link))
        if not self._link.is_symlink() or target.name == self._name:
            shutil.rmtree(target, ignore_errors=True)
        if self._link.is_symlink():
            self._link.unlink()
