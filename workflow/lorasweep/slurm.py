"""What the SLURM executor plugin leaves to be done: see docs/slurm.md."""

import asyncio
import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.layout import get_stage

MEMORY_KILL = r"exceeded memory limit|oom.kill"
"""What SLURM writes into a job's log when it, or the kernel for it, ends the job for its memory."""

SLURM_LOGS = Path(".snakemake/slurm_logs")
"""Where the executor plugin has SLURM write the logs of jobs, as `<job>.log`."""

_COMMA = "/"
"""Stands for a comma in a name."""

_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
"""What the names of variables begin with by which a person has SLURM's programs show less, or ask back."""

SECONDS_TO_CANCEL = 120
SECONDS_BETWEEN_QUERIES = 30
SECONDS_TO_QUEUE_AGAIN = 60
SECONDS_TO_SAY = 12
"""For each of two questions of a job that has half a minute to end."""

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


def forget_settings() -> None:
    """Drop from this process, and so from what it starts, a person's settings of the programs that ask SLURM.

    `SQUEUE_PARTITION` hides a run's jobs, with `SQUEUE_FORMAT2` every `squeue --format` fails, and
    `SCANCEL_INTERACTIVE` waits for an answer. What `sbatch` is told stays.
    """
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]


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


def find_memory_kill(job: str) -> str:
    """Return by what SLURM says that it ended a job for its memory, or nothing where it does not say so.

    It is asked for the states of the job and of its steps, in its accounting and, for some minutes after the end, in
    its controller; and the job's own log is read, for where a node counts memory itself it calls the job failed.
    """
    for command in (
        ("sacct", "--noheader", "--parsable2", f"--jobs={job}", "--format=State"),
        ("scontrol", "show", "job", job),
    ):
        try:
            lines = _ask(*command)
        except (OSError, subprocess.SubprocessError):
            continue
        if any("OUT_OF_MEMORY" in line for line in lines):
            return f"SLURM job {job}: OUT_OF_MEMORY, says {command[0]}"
    for log in SLURM_LOGS.rglob(f"{job}.log"):
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines():
            if re.search(MEMORY_KILL, line):
                return f"SLURM job {job}: {line.strip()[:120]}"
    return ""


def requeue_if_preempted() -> str:
    """Have SLURM queue this process's job again, if it is one that has to give way; return what to say of it.

    SLURM tells such a job by SIGTERM, a GraceTime before it takes the node and queues the job again. One that ends by
    itself in that time has failed for SLURM, unless it is queued again before.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    try:
        said = " ".join(_ask("scontrol", "show", "job", job, timeout=SECONDS_TO_SAY))
        if not re.search(r"\bPreemptTime=\d", said):
            return ""
        _ask("scontrol", "requeue", job, timeout=SECONDS_TO_SAY)
    except (OSError, subprocess.SubprocessError) as error:
        return f"whether SLURM job {job} had to give way, and is queued again, is not known: {error}"
    return f"SLURM job {job} has to give way to another, and is queued again"


def mend_status_queries() -> None:
    """Let the executor plugin (2.8.0) see every job's end.

    It compares states with `CANCELLED`, and `sacct` says `CANCELLED by 1000`: such a job counts as running for ever. So
    does one that had to give way, or whose node died, where it is not queued again (`PreemptMode=CANCEL`): it counts
    here as cancelled a minute later. And it forgets all jobs when a query fails five times within a second, as it does
    while the accounting database is away; so a query is repeated here until it is answered.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status
    since: dict[str, float] = {}

    def mend(job: str, state: str) -> str:
        if state not in ("PREEMPTED", "NODE_FAIL"):
            since.pop(job, None)
        elif time.monotonic() - since.setdefault(job, time.monotonic()) > SECONDS_TO_QUEUE_AGAIN:
            _LOGGER.warning(f"SLURM job {job} has ended ({state}), and is not queued again.")
            return "CANCELLED"
        return state.partition(" ")[0]

    async def query_job_status(command: str, logger: object) -> tuple[dict[str, str], float]:
        while True:
            states, seconds = await query(command, logger)
            if states is not None:
                return {job: mend(job, state) for job, state in states.items()}, seconds
            _LOGGER.warning(f"SLURM does not say how the jobs are; asking again in {SECONDS_BETWEEN_QUERIES} s.")
            await asyncio.sleep(SECONDS_BETWEEN_QUERIES)

    plugin.query_job_status = query_job_status


def mend_target_names() -> None:
    """Let a job on SLURM be of a point whose name has a comma, as those of points of several variables have.

    A job's own Snakemake is told its wildcards as a list with commas, which it splits at every comma (9.27.1). So they
    are told with another sign, which no name has, and read so: both in the process that submits and in the job's.
    """
    from snakemake.dag import DAG
    from snakemake_interface_executor_plugins.executors import real

    encode, new_job = real.encode_target_jobs_cli_args, DAG.new_job

    def encode_target_jobs_cli_args(specs: Iterable[Any]) -> list[str]:
        told = [spec._replace(wildcards_dict=_replace(spec.wildcards_dict, ",", _COMMA)) for spec in specs]
        return list(encode(told))

    async def new_job_of_target(dag: Any, rule: Any, *arguments: Any, **named: Any) -> Any:
        if named.get("wildcards_dict"):
            named["wildcards_dict"] = _replace(named["wildcards_dict"], _COMMA, ",")
        return await new_job(dag, rule, *arguments, **named)

    real.encode_target_jobs_cli_args = encode_target_jobs_cli_args
    DAG.new_job = new_job_of_target


def _replace(wildcards: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    return {name: str(value).replace(old, new) for name, value in wildcards.items()}


def _ask(*command: str, timeout: float = 60) -> list[str]:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=timeout)
    return done.stdout.splitlines()
