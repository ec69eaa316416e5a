"""The merged models of a run (mode B1): their folder, and the removal of those that no job will read."""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from lorasweep.util.errors import InputError


class MergedModels(logging.Handler):
    """Remove the merged model of a point whose merge or evaluation has failed for good, from Snakemake's messages.

    Snakemake deletes a merged model after its evaluation. One that was merged for an evaluation that fails would stay.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` is the experiment's folder of merged models, in a folder that has nothing else."""
        super().__init__()
        self._folder = folder
        self._retries = 0
        self._failures: dict[int, int] = {}

    def expect_retries(self, retries: int) -> None:
        """Set the number of times that a failed job is started again."""
        self._retries = retries

    def prepare(self, elsewhere: str | None) -> None:
        """Make the folder's parent a link if the models are to be `elsewhere`, a directory that all nodes see.

        Raises:
            InputError: the directory cannot be written to.
        """
        if self._folder.exists() and any(self._folder.iterdir()):
            return  # a killed run left models that this run evaluates
        self.remove_all()
        if not elsewhere:
            return
        link = self._folder.parent
        key = hashlib.sha256(str(link.absolute()).encode()).hexdigest()[:8]
        target = Path(elsewhere).absolute() / f"lorasweep-{link.parent.name}-{key}"
        try:
            target.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target)
        except OSError as error:
            raise InputError(
                f"evaluation.merged_models_in: {elsewhere!r} cannot be written to ({error.strerror})",
                "a directory that all nodes can write to, or null",
            ) from error

    def emit(self, record: logging.LogRecord) -> None:
        """Count the failures of a job, and remove its model after the last one."""
        if str(getattr(record, "event", "")) != "job_error":
            return
        fields = record.__dict__
        if fields["rule_name"] not in ("merge", "evaluate"):
            return
        job = fields["jobid"]
        self._failures[job] = self._failures.get(job, 0) + 1
        for log in map(Path, map(str, fields["log"])):
            if log.parent.name == fields["rule_name"]:
                point = log.name.removesuffix(".log")
                # What a killed merge has written is of no use to its retry.
                shutil.rmtree(self._folder / f".{point}.partial", ignore_errors=True)
                if self._failures[job] > self._retries:
                    shutil.rmtree(self._folder / point, ignore_errors=True)

    def remove_all(self) -> None:
        """Remove all merged models, their folder and its parent."""
        link = self._folder.parent
        shutil.rmtree(os.path.realpath(link), ignore_errors=True)
        if link.is_symlink():
            link.unlink()
