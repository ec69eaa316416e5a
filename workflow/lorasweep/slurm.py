"""What the SLURM executor plugin leaves to be done: see docs/slurm.md."""

import base64
import binascii
import json
import logging
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_CANCEL = 120


@dataclass(frozen=True)
class Orphan:
    """A job of a run that died."""

    job: str
    """Its id."""
    path: str
    """One of the files that it makes."""
    trains: bool
    """Whether it is a training that runs: worth hours, and to be waited for."""


def find_orphans(incomplete: Path, results: str) -> list[Orphan]:
    """Return the jobs that still wait or run for outputs of an experiment which no run waits for.

    Snakemake marks the outputs of a job that it submitted as incomplete: a file in `.snakemake/incomplete` that is
    named by the output's path in base64 and holds the job's id.
    """
    marks: dict[str, str] = {}
    for mark in incomplete.rglob("*") if incomplete.is_dir() else ():
        if mark.is_file() and (job := _read_mark(mark)):
            path = _decode(mark.relative_to(incomplete))
            if path.startswith(f"{results}/"):
                marks.setdefault(job, path)
    if not marks:
        return []
    try:
        states = list_jobs()
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger("snakemake.logging").warning(
            f"Whether jobs of an earlier run still run is not known: {error}"
        )
        return []
    return [
        Orphan(job, path, trains="/adapter/" in path and states[job] == "RUNNING")
        for job, path in sorted(marks.items())
        if job in states
    ]


def list_jobs() -> dict[str, str]:
    """Return the states of this user's jobs that wait or run, by job id.

    Raises:
        OSError, subprocess.SubprocessError: `squeue` is missing, or does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--format=%i|%T"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return dict(line.strip().split("|", 1) for line in said.splitlines() if "|" in line)


def cancel_jobs(jobs: Iterable[str]) -> set[str]:
    """Cancel jobs and wait until they are gone; return those that are still there after two minutes.

    Raises:
        OSError, subprocess.SubprocessError: SLURM does not answer.
    """
    left = set(jobs)
    if left:
        subprocess.run(["scancel", *sorted(left)], capture_output=True, check=True, timeout=60)
    deadline = time.monotonic() + SECONDS_TO_CANCEL
    while left and time.monotonic() < deadline:
        time.sleep(1)
        left &= list_jobs().keys()
    return left


def read_states_exactly() -> None:
    """Let the executor plugin see that a job was cancelled.

    `sacct` says `CANCELLED by 1000`, which is none of the states that the plugin (2.8.0) knows, so that it takes the
    job for a running one and waits for ever.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status

    async def query_job_status(*arguments: object) -> tuple[dict[str, str] | None, float | None]:
        states, seconds = await query(*arguments)
        return states and {job: state.partition(" ")[0] for job, state in states.items()}, seconds

    plugin.query_job_status = query_job_status


def _read_mark(mark: Path) -> str | None:
    try:
        job = json.loads(mark.read_text()).get("external_jobid")
    except (OSError, ValueError):  # being written, or removed
        return None
    return str(job) if job else None


def _decode(name: Path) -> str:
    """The path that a mark stands for; a long one is cut into folders that start with `@`."""
    try:
        return base64.urlsafe_b64decode("".join(part.removeprefix("@") for part in name.parts)).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""
