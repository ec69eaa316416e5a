"""Find SLURM jobs that outlived their run."""

import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from lorasweep.stages import TRAINER_RULES
from lorasweep.util.errors import InputError
from lorasweep.util.slurm import ask_patiently


@dataclass(frozen=True)
class Orphan:
    """A SLURM job of a run that died."""

    job: str
    """The SLURM job id."""
    run: str
    """The run's id, which is also the SLURM job's name."""
    rule: str
    name: str
    """Name of the point, training or batch."""
    is_running: bool

    @property
    def is_awaited(self) -> bool:
        """Whether the job is a running training, which may be worth hours. All other jobs are cancelled."""
        return self.rule in TRAINER_RULES and self.is_running


def find_orphans(runs: Iterable[str]) -> list[Orphan]:
    """Return the pending and running SLURM jobs of dead runs. While SLURM does not answer, it is asked again.

    The executor plugin uses the run's id as job name and writes `rule_<rule>_wildcards_<name>` into the job's comment.
    After a blank follows the mark of the submission.

    Raises:
        InputError: SLURM cannot be asked.
    """
    names = ",".join(runs)
    if not names:
        return []
    try:
        lines = ask_patiently("squeue", "--me", "--noheader", f"--name={names}", "--format=%i|%j|%T|%k")
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(
            f"squeue: SLURM jobs of an earlier run may still run, and cannot be looked for: {error}"
        ) from None
    orphans = []
    for line in lines:
        job, run, state, comment = line.strip().split("|", 3)
        rule, _, name = comment.partition(" ")[0].removeprefix("rule_").partition("_wildcards_")
        orphans.append(Orphan(job, run, rule, name, is_running=state == "RUNNING"))
    return orphans
