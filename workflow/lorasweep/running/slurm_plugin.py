"""Runtime patches of Snakemake and its SLURM plugin, tested with the versions in `TESTED`.

All patches of the process that runs a sweep are here; those of Snakemake in a SLURM job are in `snakemake_in_job`.
"""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from lorasweep.running.end_marks import SECONDS_BETWEEN_LOOKS, SECONDS_WHILE_JOBS_END, EndWatch
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record
from lorasweep.util.slurm import LOGGER, ask, read_time_limit
from lorasweep.util.slurm_commands import A_DAY, CLOSED, ENDED, FOLDER, PATIENCE, Outage, find_outage
from lorasweep.util.versions import get_versions

TESTED = {
    "snakemake": "9.27.1",
    "snakemake-executor-plugin-slurm": "2.8.0",
    "snakemake-executor-plugin-slurm-jobstep": "0.6.1",
}
"""Tested versions of the patched packages."""

SNAKEMAKE = Path(__file__).with_name("snakemake_in_job.py")
"""The program that is Snakemake in a SLURM job."""

SECONDS_TO_QUEUE_AGAIN = 60

SECONDS_LONGER = 10
"""Seconds by which the plugin's wait grows from one question to SLURM to the next."""

SECONDS_TO_REAPPEAR = 120
"""Seconds after which a job that SLURM does not know any more has ended, if it left no word."""


def warn_of_other_versions() -> None:
    """Warn if a patched package is installed in another version than the tested one."""
    for package, tested in TESTED.items():
        if (version := get_versions(package).get(package)) != tested:
            LOGGER.warning(
                f"{package} {version} is installed, and lorasweep was tested with {tested}: see docs/how-to/slurm.md"
            )


def mend_plugin(logs: Path, needs_no_gpu: Callable[[Any], bool], get_awaited_job: Callable[[Any], str | None]) -> None:
    """Apply all patches of the executor plugin.

    `logs` is the folder of the logs of SLURM jobs. `needs_no_gpu` tells of a job that is ready whether it needs no GPU,
    whatever a profile requests for its rule. `get_awaited_job` returns the SLURM job whose end a job has to wait for.
    """
    mend_python_path()
    mend_gpu_requests(needs_no_gpu)
    mend_dependencies(get_awaited_job)
    mend_job_commands(needs_no_gpu)
    watch = EndWatch()
    mend_looks(watch)
    mend_status_queries(watch)
    mend_cancellation()
    mend_log_folder(logs)


def mend_job_commands(needs_no_gpu: Callable[[Any], bool]) -> None:
    """Patch the executor plugin so that a SLURM job starts Snakemake once, and faster.

    The plugin's job is a Snakemake with the executor `slurm-jobstep`, whose one act is to start a second Snakemake by
    `srun`; both import and parse everything (https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/400,
    similar: issues/215). The patch has the job call `srun` itself, with the options that the executor would give, and
    starts Snakemake by `snakemake_in_job`. For `needs_no_gpu`, see `mend_plugin`.
    """
    import snakemake_executor_plugin_slurm as plugin
    from snakemake_executor_plugin_slurm_jobstep import get_cpu_setting, get_gpu_setting, get_node_setting

    executor = plugin.Executor
    command_of, python_of = executor.format_job_exec, executor.get_python_executable

    def format_job_exec(self: Any, job: Any) -> str:
        no_gpu = needs_no_gpu(job)
        cpus = get_cpu_setting(job, bool(job.resources.get("gpu")) and not no_gpu)
        gpus = "" if no_gpu else get_gpu_setting(job)
        # `exec` replaces the shell, which a signal to the job would end before its step.
        return f"exec srun -n1 --cpu-bind=q {cpus} {gpus} {get_node_setting(job)} {command_of(self, job)}"

    def get_python_executable(self: Any) -> str:
        return f"{python_of(self)} {shlex.quote(str(SNAKEMAKE))}"

    executor.format_job_exec = format_job_exec
    executor.additional_general_args = lambda self: ""
    executor.get_python_executable = get_python_executable


def mend_looks(watch: EndWatch) -> None:
    """Patch the executor plugin to see a job's end by its mark, within a second, and to ask SLURM less often.

    The plugin asks SLURM for all states, and waits ten seconds longer after each answer that has no end of a job,
    whatever `--seconds-between-status-checks` says
    (https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/319). Those waits stay, for jobs that leave no
    mark; an end that is seen by its mark does not shorten them, as it would in the plugin.
    """
    import snakemake_executor_plugin_slurm as plugin

    executor = plugin.Executor
    check = executor.check_active_jobs

    async def check_active_jobs(self: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
        seconds = self.next_seconds_between_status_checks
        if active_jobs:
            watch.look({job.external_jobid for job in active_jobs}, seconds)
        else:
            watch.rest()
        left = set()
        async for job in check(self, active_jobs):
            left.add(job.external_jobid)
            yield job
        ended = {job.external_jobid for job in active_jobs} - left
        watch.forget(ended)
        if ended and not watch.is_told_by_slurm:
            longer = seconds + SECONDS_LONGER if watch.asks_slurm else seconds
            self.next_seconds_between_status_checks = min(longer, SECONDS_WHILE_JOBS_END)

    async def sleep(self: Any) -> None:
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            jobs = {job.external_jobid for job in list(self.active_jobs)}
            if not jobs or not self.wait or watch.is_due(jobs, self.next_seconds_between_status_checks):
                return

    executor.check_active_jobs = check_active_jobs
    executor.sleep = sleep


def mend_cancellation() -> None:
    """Patch the executor plugin so that a run that is interrupted submits no more jobs.

    The plugin hands jobs to threads that submit them, and at its end waits until all are submitted: under a limit on
    the number of jobs, until most have run. We know of no issue.
    """
    import snakemake_executor_plugin_slurm as plugin

    executor = plugin.Executor
    cancel, report_error = executor.cancel, executor._report_job_error_threadsafe
    is_over = threading.Event()

    def cancel_with_submissions(self: Any) -> None:
        is_over.set()
        with contextlib.suppress(OSError, KeyError):
            Path(os.environ[FOLDER], CLOSED).touch()
        self._job_submission_executor.shutdown(wait=False, cancel_futures=True)
        cancel(self)

    def report_unless_over(self: Any, *arguments: Any) -> None:
        # A submission that was given up is no failure of its job.
        if not is_over.is_set():
            report_error(self, *arguments)

    executor.cancel = cancel_with_submissions
    executor._report_job_error_threadsafe = report_unless_over


def mend_status_queries(watch: EndWatch | None = None) -> None:
    """Patch the executor plugin to notice the end of every job, and to survive an unavailable accounting database.

    - The plugin compares states with `CANCELLED`, but `sacct` reports `CANCELLED by 1000`: such a job counts as running
      for ever. We know of no issue; its predecessor had the bug: https://github.com/Snakemake-Profiles/slurm/pull/22.
    - The plugin counts a job as running that was preempted or whose node died, since SLURM may requeue it
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/pull/132 and pull/411). If SLURM does not
      (`PreemptMode=CANCEL`), the patch reports the job as cancelled after a minute.
    - The plugin forgets all jobs when a query fails five times within a second
      (https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/207). The patch repeats the query until it
      succeeds.
    - The plugin waits for ever for a job that SLURM has forgotten, for example after an outage longer than
      `MinJobAge`. The patch reads the job's own word of its end (`lorasweep.util.slurm_commands.turn`). So a small
      `MinJobAge` is no reason to ask `sacct` instead, as the plugin does, also where there is no accounting.
    """
    import snakemake_executor_plugin_slurm as plugin

    watch = watch or EndWatch()
    query = plugin.query_job_status
    lost_since: dict[str, float] = {}
    forgotten_since: dict[str, float] = {}

    def mend(job: str, state: str) -> str:
        if state not in ("PREEMPTED", "NODE_FAIL"):
            lost_since.pop(job, None)
        elif time.monotonic() - lost_since.setdefault(job, time.monotonic()) > SECONDS_TO_QUEUE_AGAIN:
            LOGGER.warning(f"SLURM job {job} has ended ({state}) and was not requeued.")
            return "CANCELLED"
        return state.partition(" ")[0]

    def add_forgotten(states: dict[str, str]) -> None:
        folder = os.environ.get(FOLDER, "")  # without one, no job has left a word
        for job in watch.jobs:
            if job in states:
                forgotten_since.pop(job, None)
                continue
            state = find_record(Path(folder, "jobs", f"{job}.json")).get("state")
            if state in ENDED:
                states[job] = state
            elif state and time.monotonic() - forgotten_since.setdefault(job, time.monotonic()) > SECONDS_TO_REAPPEAR:
                LOGGER.warning(f"SLURM does not know job {job} any more, and it left no word of its end.")
                states[job] = "CANCELLED"

    async def query_job_status(command: str, logger: object) -> tuple[dict[str, str], float]:
        completed = dict.fromkeys(watch.completed, "COMPLETED")
        if not watch.asks_slurm:
            return completed, 0.0
        outage = Outage(shlex.split(command)[0])
        # Once: the plugin gives up after a minute, and leaves the command running.
        once = f"env {PATIENCE}=0 {command}"
        try:
            while True:
                states, seconds = await query(once, logger)
                if states is not None:
                    states = {job: mend(job, state) for job, state in states.items()}
                    add_forgotten(states)
                    watch.note_ended({job for job, state in states.items() if state in ENDED})
                    return states | completed, seconds
                if not await asyncio.to_thread(outage.wait, "it gives no states of jobs"):
                    raise InputError("SLURM has not given the states of jobs for as long as slurm.wait_hours says")
        finally:
            outage.end()

    plugin.query_job_status = query_job_status
    plugin.get_min_job_age = lambda: A_DAY


_NO_ARRAYS = (
    "--slurm-array-jobs: SLURM would give all jobs of an array what the first one requests, and after an interruption "
    "nothing would tell which of them still run. Expected: without it, on the command line and in the profile. Each "
    "job is submitted by itself"
)
"""The plugin's arrays have two more faults. If there are several at a time, their indices exceed `MaxArraySize`; and
jobs may get lost: https://github.com/snakemake/snakemake-executor-plugin-slurm/issues/473."""


def find_refusals(executor: Any, jobs: Iterable[Any], count_gpus: Callable[[Any], int]) -> list[str]:
    """Return why jobs would be refused for ever, by SLURM in its own words, or by us: one text for each rule.

    `executor` is the executor plugin's, and `jobs` are Snakemake's. `count_gpus` returns how many GPUs a job uses: a
    site's profile may request others by `gres`. SLURM is asked with `sbatch --test-only`, with the options that the
    plugin would submit with. What passes, such as an outage or a limit on the number of jobs, is no reason.
    """
    from snakemake_executor_plugin_slurm.submit_string import get_submit_command
    from snakemake_executor_plugin_slurm.utils import set_gres_string

    if executor.array_jobs:
        return [_NO_ARRAYS]
    refusals: dict[str, str] = {}
    asked = set()
    for job in jobs:
        # Once for jobs alike, since the plugin asks SLURM for the account of each.
        kind = (job.rule.name, job.threads, tuple(sorted((name, str(value)) for name, value in job.resources.items())))
        if kind in asked or job.rule.name in refusals:
            continue
        asked.add(kind)
        gpus, requested = count_gpus(job), _count_requested_gpus(job)
        if gpus and requested and gpus != requested:
            refusals[job.rule.name] = (
                f"its jobs use {gpus} GPUs and request {requested}. Expected: gpu={gpus}, or {gpus} as the number in "
                "gres with gpu=0, in the profile's set-resources or by --set-resources"
            )
            continue
        parts = {
            "run_uuid": "test",
            "slurm_logfile": os.devnull,
            "comment_str": job.rule.name,
            "account": next(executor.get_account_arg(job)),
            "partition": executor.get_partition_arg(job),
            "workdir": executor.workflow.workdir_init,
        }
        call = get_submit_command(job, parts, executor.workflow.executor_settings) + set_gres_string(job)
        try:
            ask(*shlex.split(call), "--test-only", "--wrap=true")
            refusal = _find_time_limit(job, call)
        except subprocess.CalledProcessError as error:
            refusal = "" if find_outage(error.stderr) else error.stderr.strip()
        except (OSError, subprocess.SubprocessError):  # the submission itself waits for an answer
            continue
        if refusal:
            refusals[job.rule.name] = f"SLURM would refuse its jobs: {refusal} ({call})"
    return [f"{rule}: {refusal}" for rule, refusal in refusals.items()]


def _find_time_limit(job: Any, call: str) -> str:
    """Return that a job asks for more time than its partitions give, or "".

    SLURM takes such a job, unless it is told to enforce the limits of partitions (`EnforcePartLimits`), and never
    starts it. A QOS may allow what the partition does not.
    """
    options = shlex.split(call)
    runtime = job.resources.get("runtime")
    if (
        not isinstance(runtime, int)
        or any(option.startswith("--qos") for option in options)
        or "SBATCH_QOS" in os.environ
    ):
        return ""
    limit = read_time_limit(options[options.index("-p") + 1] if "-p" in options else "")
    if runtime <= limit:
        return ""
    return f"the time limit of {runtime} minutes is over that of the partition, {limit:g} minutes; see runtime"


def _count_requested_gpus(job: Any) -> int:
    """Return how many GPUs a job requests by `gpu` and by `gres`, such as gpu:a100:2 or gpu:3g.40gb:1."""
    gres = re.search(r"\bgpu(?::(?!\d+\b)[^:,]+)?(?::(\d+))?", job.resources.get("gres", ""))
    return int(job.resources.get("gpu") or 0) + (int(gres[1] or 1) if gres else 0)


def mend_gpu_requests(needs_no_gpu: Callable[[Any], bool]) -> None:
    """Patch the executor plugin to ask for no GPU for jobs that need none, whatever a profile requests for their rule.

    Only when a job is ready is it known whether its training was stopped before (`prune`). For `needs_no_gpu`, see
    `mend_plugin`.
    """
    import snakemake_executor_plugin_slurm as plugin

    describe = plugin.set_gres_string
    plugin.set_gres_string = lambda job: "" if needs_no_gpu(job) else describe(job)


def mend_dependencies(get_awaited_job: Callable[[Any], str | None]) -> None:
    """Patch the executor plugin to have SLURM start a job after another's end. For the argument, see `mend_plugin`.

    The resource `slurm_extra` could say so as well. But a job has only one, which may be that of a site's profile.
    """
    import snakemake_executor_plugin_slurm as plugin

    submit = plugin.get_submit_command

    def get_submit_command(job: Any, *arguments: Any, **options: Any) -> str:
        call: str = submit(job, *arguments, **options)
        awaited = get_awaited_job(job)
        return f"{call} --dependency=afterany:{awaited}" if awaited else call

    plugin.get_submit_command = get_submit_command


def mend_log_folder(folder: Path) -> None:
    """Patch the executor plugin to keep the logs of SLURM jobs in a folder of the sweep's own.

    At its end, the plugin removes all empty folders below `.snakemake/slurm_logs`. Among them may be those of another
    sweep's queued jobs, which then fail as they start, since SLURM cannot open their logs (signal 53). We know of no
    issue.
    """
    import snakemake_executor_plugin_slurm as plugin

    select = plugin._select_logdir

    def _select_logdir(workflow: Any) -> Path:
        chosen: Path = select(workflow) if workflow.executor_settings.logdir else folder.absolute()
        return chosen

    plugin._select_logdir = _select_logdir


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
    """Patch the executor so that SLURM jobs start if the environment's path contains a space.

    Snakemake does not quote the path of Python: https://github.com/snakemake/snakemake/issues/3211.
    """
    from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

    plain = RemoteExecutor.get_python_executable
    RemoteExecutor.get_python_executable = lambda self: shlex.quote(plain(self))
