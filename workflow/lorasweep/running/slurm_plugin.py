"""What is changed of Snakemake and its SLURM plugin while they run. All of it is here, and is tested with `TESTED`."""

import asyncio
import shlex
import signal
import threading
import time
from typing import Any, Protocol

from lorasweep.util.slurm import LOGGER
from lorasweep.util.versions import get_versions

TESTED = {
    "snakemake": "9.27.1",
    "snakemake-executor-plugin-slurm": "2.8.0",
    "snakemake-executor-plugin-slurm-jobstep": "0.6.1",
}
"""The versions of the packages that are changed here."""

SECONDS_BETWEEN_QUERIES = 30

SECONDS_TO_QUEUE_AGAIN = 60


def warn_of_other_versions() -> None:
    """Warn where a package that is changed here has another version than the one that was tested."""
    for package, tested in TESTED.items():
        if (version := get_versions(package).get(package)) != tested:
            LOGGER.warning(
                f"{package} {version} is installed, and lorasweep was tested with {tested}: see docs/slurm.md"
            )


def mend_status_queries() -> None:
    """Let the executor plugin see every job's end, and outlast an accounting database that does not answer.

    - It compares states with `CANCELLED`, and `sacct` says `CANCELLED by 1000`: such a job counts as running for ever.
      No issue of the plugin is known; its forerunner had it: https://github.com/Snakemake-Profiles/slurm/pull/22.
    - A job that had to give way, or whose node died, counts as running, since SLURM may queue it again
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/pull/132 and pull/411). Where SLURM does not
      (`PreemptMode=CANCEL`), it counts here as cancelled a minute later.
    - It forgets all jobs when a query fails five times within a second
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/207). Here a query is repeated until it is
      answered.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status
    since: dict[str, float] = {}

    def mend(job: str, state: str) -> str:
        if state not in ("PREEMPTED", "NODE_FAIL"):
            since.pop(job, None)
        elif time.monotonic() - since.setdefault(job, time.monotonic()) > SECONDS_TO_QUEUE_AGAIN:
            LOGGER.warning(f"SLURM job {job} has ended ({state}), and is not queued again.")
            return "CANCELLED"
        return state.partition(" ")[0]

    async def query_job_status(command: str, logger: object) -> tuple[dict[str, str], float]:
        while True:
            states, seconds = await query(command, logger)
            if states is not None:
                return {job: mend(job, state) for job, state in states.items()}, seconds
            LOGGER.warning(f"SLURM does not say how the jobs are; asking again in {SECONDS_BETWEEN_QUERIES} s.")
            await asyncio.sleep(SECONDS_BETWEEN_QUERIES)

    plugin.query_job_status = query_job_status


class Scheduler(Protocol):
    """What of Snakemake's scheduler is called here."""

    def exit_gracefully(self, *arguments: object) -> None:
        """Let the jobs that run finish, and start no more."""


def mend_end_by_signal(scheduler: Scheduler) -> None:
    """Let a run that gets SIGTERM end, also while it chooses its next jobs.

    Snakemake takes its scheduler's lock in the handler of the signal, and waits for itself for ever where it
    holds that lock already, as it does while it chooses. A thread of its own can wait. No issue is known upstream.
    """

    def end(*_: object) -> None:
        threading.Thread(target=scheduler.exit_gracefully).start()

    signal.signal(signal.SIGTERM, end)


def mend_python_path() -> None:
    """Let jobs on SLURM start where the environment's path has a blank.

    Snakemake does not quote the path of Python: https://github.com/snakemake/snakemake/issues/3211.
    """
    import snakemake_executor_plugin_slurm_jobstep as jobstep
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    for executor in (RemoteExecutor, jobstep.Executor):
        plain = executor.get_python_executable

        def get_python_executable(self: Any, plain: Any = plain) -> str:
            return shlex.quote(plain(self))

        executor.get_python_executable = get_python_executable
