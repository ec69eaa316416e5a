"""Queries and commands to SLURM beyond those of the executor plugin: see docs/how-to/slurm.md."""

import contextlib
import logging
import math
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from lorasweep.util import slurm_commands

MEMORY_KILL = r"exceeded memory limit|oom.kill"
"""Pattern of the lines that SLURM writes into a job's log when the job is killed for running out of memory."""

LOGS = "logs"
"""Folder in the run's folder in which the executor plugin has SLURM write the logs of jobs, as `<job>.log`."""

COMMANDS = Path(__file__).parents[3] / "scripts/slurm"
"""Folder of the commands that wait while SLURM does not answer."""

_SETTINGS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")
"""Prefixes of environment variables with which a user changes the output or the prompts of SLURM's commands."""

SECONDS_TO_CANCEL = 120
SECONDS_TO_SAY = 12
"""Timeout in seconds of each of two SLURM commands in a job that has 30 seconds to end."""

LOGGER = logging.getLogger("snakemake.logging")


def forget_settings() -> None:
    """Remove the user's settings of SLURM's query commands from the environment of this process and its children.

    `SQUEUE_PARTITION` hides jobs of the run, `SQUEUE_FORMAT2` makes every `squeue --format` fail, and
    `SCANCEL_INTERACTIVE` waits for an answer. The settings of `sbatch` stay.
    """
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]


@cache
def count_gpus() -> int | None:
    """Return the number of GPUs of the cluster; `None` if SLURM knows of none, or does not answer."""
    try:
        lines = ask("sinfo", "--noheader", "--Node", "--format=%N|%G", timeout=SECONDS_TO_SAY)
    except (OSError, subprocess.SubprocessError):
        return None
    nodes = dict(line.split("|", 1) for line in lines if "|" in line)  # a node has a line for each partition
    # Such as gpu:4 or gpu:a100:4(S:0-1), beside other devices.
    return sum(int(gpus) for text in nodes.values() for gpus in re.findall(r"\bgpu:(?:[^:,()]+:)?(\d+)", text)) or None


@cache
def read_time_limit(partitions: str) -> float:
    """Return the longest time limit in minutes of partitions, named with commas; "" stands for the default partition.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer.
    """
    lines = [line.split("|") for line in ask("sinfo", "--noheader", "--format=%P|%l")]
    named = partitions.split(",")
    limits = [limit for name, limit in lines if name.rstrip("*") in named or (not partitions and name.endswith("*"))]
    return max(map(_read_minutes, limits), default=math.inf)


def _read_minutes(time_limit: str) -> float:
    """Return a time limit in minutes, given as `sinfo` prints it: `5:00`, `1-00:00:00`, `infinite`."""
    days, _, clock = time_limit.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in parts):
        return math.inf
    hours, minutes, seconds = map(int, ["0", "0", *parts][-3:])
    return 1440 * int(days or 0) + 60 * hours + minutes + seconds / 60


def read_elapsed(jobs: Iterable[str]) -> dict[str, float]:
    """Return the elapsed seconds of each job from SLURM's accounting; {} if there is no accounting.

    Those of a job that SLURM has queued again are the sum over its starts. An older job of the same id, from before
    SLURM's ids began anew, has another name.
    """
    ids = ",".join(jobs)
    if not ids:
        return {}
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", f"--jobs={ids}"]
    try:
        lines = ask(*command, "--format=JobIDRaw,ElapsedRaw,JobName")
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split("|", 2) for line in lines if line.count("|") >= 2]
    names = {job: name for job, _, name in rows}  # the last start comes last
    elapsed: Counter[str] = Counter()
    for job, seconds, name in rows:
        if seconds.isdigit() and name == names[job]:
            elapsed[job] += int(seconds)
    return {job: float(seconds) for job, seconds in elapsed.items()}


def cancel_jobs(jobs: Iterable[str]) -> set[str]:
    """Cancel jobs and wait until they end; return the ids of those that still exist after two minutes.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer for a day.
    """
    remaining = set(jobs)
    if remaining:
        # It fails if one has ended meanwhile and SLURM has forgotten it.
        with contextlib.suppress(subprocess.CalledProcessError):
            ask_patiently("scancel", *sorted(remaining))
    deadline = time.monotonic() + SECONDS_TO_CANCEL
    while remaining and time.monotonic() < deadline:
        time.sleep(1)
        remaining &= {line.strip() for line in ask_patiently("squeue", "--me", "--noheader", "--format=%i")}
    return remaining


def find_memory_kill(job: str) -> str:
    """Return SLURM's evidence that a job was killed for running out of memory, or "" if there is no evidence.

    Checked are the states of the job and its steps in the accounting and in the controller, which keeps them for some
    minutes after the job's end. The job's own log is read too: where the node enforces the memory limit by itself,
    SLURM reports the job as failed.
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
            return f"SLURM job {job}: OUT_OF_MEMORY, reported by {command[0]}"
    folder = os.environ.get(slurm_commands.FOLDER)
    for log in Path(folder, LOGS).rglob(f"{job}.log") if folder else ():
        for line in log.read_text(errors="replace", encoding="utf-8").splitlines():
            if re.search(MEMORY_KILL, line):
                return f"SLURM job {job}: {line.strip()}"
    return ""


def requeue_if_preempted() -> str:
    """Have SLURM requeue the job of this process if it is being preempted; return a message, or "".

    SLURM sends a preempted job SIGTERM, and requeues it only after the partition's GraceTime. A job that ends within
    that time counts as failed, unless it is requeued before.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job:
        return ""
    try:
        output = " ".join(ask("scontrol", "show", "job", job, timeout=SECONDS_TO_SAY))
        if not re.search(r"\bPreemptTime=\d", output):
            return ""
        ask("scontrol", "requeue", job, timeout=SECONDS_TO_SAY)
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not check whether SLURM job {job} is preempted, or could not requeue it: {error}"
    return f"SLURM job {job} is preempted, and was requeued"


def use_patient_commands(folder: Path) -> None:
    """Have this process and all that it starts use SLURM's commands as those that wait while SLURM does not answer.

    `folder` is the run's folder for SLURM, in which they keep their records.
    """
    os.environ[slurm_commands.FOLDER] = str(folder.absolute())
    os.environ[slurm_commands.RUN] = str(os.getpid())
    os.environ["PATH"] = f"{COMMANDS}{os.pathsep}{os.environ['PATH']}"


def ask(*command: str, timeout: float = 60) -> list[str]:
    """Run a SLURM command once and return the lines of its output.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=True,
        timeout=timeout,
        env=os.environ | {slurm_commands.PATIENCE: "0"},
    )
    return done.stdout.splitlines()


def ask_patiently(*command: str) -> list[str]:
    """Run a SLURM command, again while SLURM does not answer, and return the lines of its output.

    Raises:
        OSError, subprocess.SubprocessError: there is no such command, or it fails for another reason.
    """
    done = slurm_commands.ask(*command, tell=LOGGER.warning)
    done.check_returncode()
    return done.stdout.decode(errors="replace").splitlines()
