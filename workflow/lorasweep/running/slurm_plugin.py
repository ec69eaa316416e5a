"""Runtime patches of Snakemake and its SLURM plugin. All patches are here, tested with the versions in `TESTED`."""

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
"""Tested versions of the patched packages."""

SECONDS_BETWEEN_QUERIES = 30

SECONDS_TO_QUEUE_AGAIN = 60


def warn_of_other_versions() -> None:
    """Warn if a patched package is installed in another version than the tested one."""
    for package, tested in TESTED.items():
        if (version := get_versions(package).get(package)) != tested:
            LOGGER.warning(
                f"{package} {version} is installed, and lorasweep was tested with {tested}: see docs/slurm.md"
            )


def mend_status_queries() -> None:
    """Patch the executor plugin to notice the end of every job, and to survive an unavailable accounting database.

    - The plugin compares states with `CANCELLED`, but `sacct` reports `CANCELLED by 1000`: such a job counts as running
      for ever. We know of no issue; its predecessor had the bug: https://github.com/Snakemake-Profiles/slurm/pull/22.
    - The plugin counts a job as running that was preempted or whose node died, since SLURM may requeue it
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/pull/132 and pull/411). If SLURM does not
      (`PreemptMode=CANCEL`), the patch reports the job as cancelled after a minute.
    - The plugin forgets all jobs when a query fails five times within a second
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/207). The patch repeats the query until it
      succeeds.
    """
    import snakemake_executor_plugin_slurm as plugin

    query = plugin.query_job_status
    since: dict[str, float] = {}

    def mend(job: str, state: str) -> str:
        if state not in ("PREEMPTED", "NODE_FAIL"):
            since.pop(job, None)
        elif time.monotonic() - since.setdefault(job, time.monotonic()) > SECONDS_TO_QUEUE_AGAIN:
            LOGGER.warning(f"SLURM job {job} has ended ({state}) and was not requeued.")
            return "CANCELLED"
        return state.partition(" ")[0]

    async def query_job_status(command: str, logger: object) -> tuple[dict[str, str], float]:
        while True:
            states, seconds = await query(command, logger)
            if states is not None:
                return {job: mend(job, state) for job, state in states.items()}, seconds
            LOGGER.warning(f"SLURM did not report the states of jobs; asking again in {SECONDS_BETWEEN_QUERIES} s.")
            await asyncio.sleep(SECONDS_BETWEEN_QUERIES)

    plugin.query_job_status = query_job_status


class Scheduler(Protocol):
    """The part of Snakemake's scheduler that is used here."""

    def exit_gracefully(self, *arguments: object) -> None:
        """Let running jobs finish, and start no new ones."""


def mend_end_by_signal(scheduler: Scheduler) -> None:
    """Patch the handler of SIGTERM so that a run ends even while it selects its next jobs.

    Snakemake acquires its scheduler's lock in the signal handler. While it selects jobs, it already holds that lock,
    and so would deadlock. A separate thread can wait for the lock. We know of no upstream issue.
    """

    def end(*_: object) -> None:
        threading.Thread(target=scheduler.exit_gracefully).start()

    signal.signal(signal.SIGTERM, end)


def mend_python_path() -> None:
    """Patch the executors so that SLURM jobs start if the environment's path contains a space.

    Snakemake does not quote the path of Python: https://github.com/snakemake/snakemake/issues/3211.
    """
    import snakemake_executor_plugin_slurm_jobstep as jobstep
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    for executor in (RemoteExecutor, jobstep.Executor):
        plain = executor.get_python_executable

        def get_python_executable(self: Any, plain: Any = plain) -> str:
            return shlex.quote(plain(self))

        executor.get_python_executable = get_python_executable
