"""Run a training in several processes on one machine, one per device."""

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from tqdm import tqdm

from lorasweep.trainers import Diverged, Killed, Stopped, TrainingError
from lorasweep.trainers.frame import Start
from lorasweep.util.errors import JobError, describe
from lorasweep.util.process import get_signal_at_parents_end, noticing_sigterm

_SECONDS_TO_END = 10
"""Grace period for the other processes after one has failed: before SIGTERM, and again before SIGKILL."""

_ERRORS = {error.__name__: error for error in (TrainingError, Stopped, Diverged)}
"""Errors that a process reports by name. Any other becomes a JobError."""

_LONGEST_MESSAGE = 2000
"""Maximum length of a message in characters, so that a pipe takes it in one write."""


def run_recipe(
    processes: int, device: str, run_one: Callable[..., int | None], start: Start, *arguments: Any
) -> int | None:
    """Call `run_one(*arguments, start)` here, or in several processes, each of which reads the saved state itself.

    Returns and raises what `run` does.
    """
    if processes == 1:
        return run_one(*arguments, start)
    return run(processes, device, _resume, run_one, replace(start, state=None), *arguments)


def _resume(run_one: Callable[..., int | None], start: Start, *arguments: Any) -> int | None:
    return run_one(*arguments, replace(start, state=start.saved.load()))


def run(processes: int, device: str, work: Callable[..., int | None], *arguments: Any) -> int | None:
    """Call `work` in several processes; return the largest of its results, the peak memory of a device in bytes.

    SIGTERM is passed on to the processes. They are killed when this process ends, however it ends.

    Raises:
        Diverged: a loss is not finite.
        Stopped: the training was told to stop.
        TrainingError: there are too few devices.
        Killed: a process was killed.
        JobError: a process failed otherwise.
    """
    if device == "cuda" and torch.cuda.device_count() < processes:
        raise TrainingError(
            f"controls.gpus is {processes}, but this job sees {torch.cuda.device_count()}: request as many GPUs for "
            "the rule train (resource gpu, or gres in a profile)"
        )
    # Not in the results folder: a shared file system may have no locks.
    with tempfile.TemporaryDirectory() as folder:
        reports = get_context("spawn").SimpleQueue()
        started: list[Any] = []

        def pass_on() -> None:
            for process in started:
                process.terminate()

        with noticing_sigterm(pass_on) as is_told:
            try:
                context = start_processes(
                    _work, (processes, folder, device, work, arguments, reports), processes, join=False
                )
                started += context.processes
                if is_told():
                    pass_on()
                while not context.join(grace_period=_SECONDS_TO_END):
                    pass
            except (ProcessRaisedException, ProcessExitedException) as error:
                # The first report is the cause; later ones come from processes that lost the connection to the first.
                name, message = ("", str(error)) if reports.empty() else reports.get()
                if is_told() and name not in (Stopped.__name__, Diverged.__name__):
                    # Before the first step, processes end at SIGTERM without saving.
                    raise Stopped("told to stop (SIGTERM); the next run resumes from the last saved state") from None
                if isinstance(error, ProcessExitedException) and error.signal_name:
                    raise Killed(f"the training failed; {error}") from None
                raise _ERRORS.get(name, JobError)(message) from None
        peaks = [reports.get()[1] for _ in range(processes)]
        return max((peak for peak in peaks if peak is not None), default=None)


def _work(
    rank: int,
    processes: int,
    folder: str,
    device: str,
    work: Callable[..., int | None],
    arguments: tuple[Any, ...],
    reports: Any,
) -> None:
    get_signal_at_parents_end(signal.SIGKILL)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a node's name may not resolve to the node
    # tqdm's own lock is shared by processes. If a process is killed, Python reports it as leaked at the very end.
    tqdm.set_lock(threading.RLock())
    try:
        distributed.init_process_group(
            "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo",
            init_method=f"file://{folder}/processes",
            rank=rank,
            world_size=processes,
        )
        peak = work(*arguments)
        # Not after a failure: this call would wait for the other processes.
        distributed.destroy_process_group()
    except Exception as error:
        reports.put((type(error).__name__, describe(error)[:_LONGEST_MESSAGE]))
        if not isinstance(error, TrainingError):
            traceback.print_exc()
        raise
    reports.put(("", peak))
    # At the interpreter's end, a thread of torch's may abort the process ("terminate called without an active
    # exception"), and the training that is done would count as failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
