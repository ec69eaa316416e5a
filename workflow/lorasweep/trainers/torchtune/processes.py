"""A training in several processes on one machine, one for each device."""

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Collection
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes
from tqdm import tqdm

from lorasweep.trainers import Diverged, Killed, Stopped, TrainingError
from lorasweep.trainers.torchtune import loop as recipes
from lorasweep.trainers.torchtune.saved_states import SavedStates
from lorasweep.util.process import get_signal_at_parents_end

_SECONDS_TO_END = 10
"""How long the others have, twice, once one process has failed: they may wait for it in vain."""

_ERRORS = {error.__name__: error for error in (TrainingError, Stopped, Diverged)}
"""That a process tells of by name; others are of the process itself."""

_LONGEST_MESSAGE = 2000
"""Characters: a pipe takes so much at once."""


def run(
    processes: int,
    cfg: DictConfig,
    log: Path,
    point: Path,
    metric_loggers: Collection[str],
    saved: SavedStates,
    save_minutes: float,
    halvings: int,
) -> int | None:
    """Run a recipe in so many processes; return the peak memory in bytes of the device that had the largest.

    SIGTERM is passed on to them; they end with this process, however it ends.

    Raises:
        Diverged: a loss is not finite.
        Stopped: the training was told to stop.
        TrainingError: there are too few devices.
        Killed: a process was killed.
        RuntimeError: a process failed otherwise.
    """
    if cfg.device == "cuda" and torch.cuda.device_count() < processes:
        raise TrainingError(
            f"controls.gpus: {processes}, and this job sees {torch.cuda.device_count()}: the resource gpu of the rule "
            "train, or what a profile says in its place (gres), has to be as many"
        )
    # Not on what the results lie on: a shared file system may have no locks.
    with tempfile.TemporaryDirectory() as folder:
        said = get_context("spawn").SimpleQueue()
        started: list[Any] = []
        is_told = []

        def pass_on(number: int, *_: Any) -> None:
            is_told.append(number)
            for process in started:
                process.terminate()

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            arguments = (processes, folder, cfg, log, point, metric_loggers, saved, save_minutes, halvings, said)
            context = start_processes(_work, arguments, processes, join=False)
            started += context.processes
            if is_told:
                pass_on(signal.SIGTERM)
            while not context.join(grace_period=_SECONDS_TO_END):
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            # What one of them said first is the reason; the others say that they lost it.
            name, message = ("", str(error)) if said.empty() else said.get()
            if is_told and name not in (Stopped.__name__, Diverged.__name__):
                # They end at once before there is a step to save.
                raise Stopped("told to stop (SIGTERM); the next run goes on from what was saved last") from None
            if isinstance(error, ProcessExitedException) and error.signal_name:
                raise Killed(f"torchtune failed; {error}") from None
            raise _ERRORS.get(name, RuntimeError)(message) from None
        finally:
            signal.signal(signal.SIGTERM, before)
        peaks = [said.get()[1] for _ in range(processes)]
        return max((peak for peak in peaks if peak is not None), default=None)


def _work(
    rank: int,
    processes: int,
    folder: str,
    cfg: DictConfig,
    log: Path,
    point: Path,
    metric_loggers: Collection[str],
    saved: SavedStates,
    save_minutes: float,
    halvings: int,
    said: Any,
) -> None:
    get_signal_at_parents_end(signal.SIGKILL)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a node's name need not lead to itself
    # Its own is for several processes; that of one that is killed is reported as leaked, after all else is said.
    tqdm.set_lock(threading.RLock())
    try:
        distributed.init_process_group(
            "cuda:nccl,cpu:gloo" if cfg.device == "cuda" else "gloo",
            init_method=f"file://{folder}/processes",
            rank=rank,
            world_size=processes,
        )
        settings: Any = OmegaConf.to_container(cfg)
        loggers = recipes.make_loggers(metric_loggers, point, log.parent, settings) if rank == 0 else []
        peak = recipes.run(cfg, log, loggers, saved, saved.load(), save_minutes, halvings)
        # After a failure others may wait in vain, and so would this.
        distributed.destroy_process_group()
    except Exception as error:
        said.put((type(error).__name__, str(error)[:_LONGEST_MESSAGE]))
        if not isinstance(error, TrainingError):
            traceback.print_exc()
        raise
    said.put(("", peak))
