"""Jobs that a run which died has left on SLURM."""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from lorasweep.util.slurm import LOGGER, ask


@dataclass(frozen=True)
class Orphan:
    """A job of a run that died."""

    job: str
    """Its id."""
    run: str
    """The run's id, which is the job's name."""
    rule: str
    name: str
    """The point's, the training's or the batch's."""
    is_running: bool

    @property
    def is_awaited(self) -> bool:
        """Whether it is a training that runs: worth hours. Other jobs are cancelled."""
        return self.rule == "train" and self.is_running


def find_orphans(runs: Iterable[str]) -> list[Orphan]:
    """Return the jobs that still wait or run, of runs that are no more.

    The plugin names a job by its run, and writes `rule_<rule>_wildcards_<name>` into its comment.
    """
    names = ",".join(runs)
    if not names:
        return []
    try:
        lines = ask("squeue", "--me", "--noheader", f"--name={names}", "--format=%i|%j|%T|%k")
    except (OSError, subprocess.SubprocessError) as error:
        LOGGER.warning(f"Whether jobs of an earlier run still run is not known: {error}")
        return []
    orphans = []
    for line in lines:
        job, run, state, comment = line.strip().split("|", 3)
        rule, _, name = comment.removeprefix("rule_").partition("_wildcards_")
        orphans.append(Orphan(job, run, rule, name, is_running=state == "RUNNING"))
    return orphans
