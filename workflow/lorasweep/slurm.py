"""What the SLURM executor plugin leaves to be done: see docs/slurm.md."""

import asyncio
import logging
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass

from lorasweep.layout import get_stage

SECONDS_TO_CANCEL = 120
SECONDS_BETWEEN_QUERIES = 30

_LOGGER = logging.getLogger("snakemake.logging")


@dataclass(frozen=True)
class Orphan:
    """A job of a run that died."""

    job: str
    """Its id."""
    run: str
    """The run's id, which is the job's name."""
    rule: str
    point: str
    is_running: bool

    @property
    def is_awaited(self) -> bool:
        """Whether it is a training that runs: worth hours. Other jobs are cancelled."""
        return self.rule == "train" and self.is_running


def find_orphans(runs: Iterable[str]) -> list[Orphan]:
    """Return the jobs that still wait or run, of runs that are no more.

    The plugin names a job by its run, and writes `rule_<rule>_wildcards_<point>` into its comment.
    """
    names = ",".join(runs)
    if not names:
        return []
    try:
        lines = _ask("squeue", "--me", "--noheader", f"--name={names}", "--format=%i|%j|%T|%k")
    except (OSError, subprocess.SubprocessError) as error:
        _LOGGER.warning(f"Whether jobs of an earlier run still run is not known: {error}")
        return []
    orphans = []
    for line in lines:
        job, run, state, comment = line.strip().split("|", 3)
        rule, _, point = comment.removeprefix("rule_").partition("_wildcards_")
        orphans.append(Orphan(job, run, get_stage(rule), point, is_running=state == "RUNNING"))
    return orphans


def read_elapsed(jobs: Iterable[str]) -> dict[str, float]:
    """Return the seconds that SLURM's accounting has for each job; nothing where there is none."""
    ids = ",".join(jobs)
    if not ids:
        return {}
    try:
        lines = _ask(
            "sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={ids}", "--format=JobIDRaw,ElapsedRaw"
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = (line.split("|") for line in lines if line.count("|") == 1)
    return {job: float(seconds) for job, seconds in pairs if seconds.isdigit()}


def cancel_jobs(jobs: Iterable[str]) -> set[str]:
    """Cancel jobs and wait until they are gone; return those that are still there after two minutes.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer.
    """
    left = set(jobs)
    if left:
        _ask("scancel", *sorted(left))
    deadline = time.monotonic() + SECONDS_TO_CANCEL
    while left and time.monotonic() < deadline:
        time.sleep(1)
        left &= {line.strip() for line in _ask("squeue", "--me", "--noheader", "--format=%i")}
    return left


def mend_status_queries() -> None:
    """Let the executor plugin (2.8.0) see every job's end.

    It compares states with `CANCELLED`, and `sacct` says `CANCELLED by 1000`: such a job counts as running for ever.
    And it forgets all jobs when a query fails five times within a second, as it does while the accounting database is
    away; so a query is repeated here until it is answered.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status

    async def query_job_status(command: str, logger: object) -> tuple[dict[str, str], float]:
        while True:
            states, seconds = await query(command, logger)
            if states is not None:
                return {job: state.partition(" ")[0] for job, state in states.items()}, seconds
            _LOGGER.warning(f"SLURM does not say how the jobs are; asking again in {SECONDS_BETWEEN_QUERIES} s.")
            await asyncio.sleep(SECONDS_BETWEEN_QUERIES)

    plugin.query_job_status = query_job_status


def _ask(*command: str) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()
