"""What the SLURM executor plugin leaves to be done: see docs/slurm.md."""

import logging
import os
import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

MEMORY_KILL = r"exceeded memory limit|oom.kill"
"""What SLURM writes into a job's log when it, or the kernel for it, ends the job for its memory."""

SLURM_LOGS = Path(".snakemake/slurm_logs")
"""Where the executor plugin has SLURM write the logs of jobs, as `<job>.log`."""


_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
"""What the names of variables begin with by which a person has SLURM's programs show less, or ask back."""

SECONDS_TO_CANCEL = 120
SECONDS_TO_SAY = 12
"""For each of two questions of a job that has half a minute to end."""

LOGGER = logging.getLogger("snakemake.logging")


def forget_settings() -> None:
    """Drop from this process, and so from what it starts, a person's settings of the programs that ask SLURM.

    `SQUEUE_PARTITION` hides a run's jobs, with `SQUEUE_FORMAT2` every `squeue --format` fails, and
    `SCANCEL_INTERACTIVE` waits for an answer. What `sbatch` is told stays.
    """
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]


def read_elapsed(jobs: Iterable[str]) -> dict[str, float]:
    """Return the seconds that SLURM's accounting has for each job; nothing where there is none."""
    ids = ",".join(jobs)
    if not ids:
        return {}
    try:
        lines = ask(
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
        ask("scancel", *sorted(left))
    deadline = time.monotonic() + SECONDS_TO_CANCEL
    while left and time.monotonic() < deadline:
        time.sleep(1)
        left &= {line.strip() for line in ask("squeue", "--me", "--noheader", "--format=%i")}
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
            lines = ask(*command)
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
        said = " ".join(ask("scontrol", "show", "job", job, timeout=SECONDS_TO_SAY))
        if not re.search(r"\bPreemptTime=\d", said):
            return ""
        ask("scontrol", "requeue", job, timeout=SECONDS_TO_SAY)
    except (OSError, subprocess.SubprocessError) as error:
        return f"whether SLURM job {job} had to give way, and is queued again, is not known: {error}"
    return f"SLURM job {job} has to give way to another, and is queued again"


def ask(*command: str, timeout: float = 60) -> list[str]:
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=timeout)
    return done.stdout.splitlines()
