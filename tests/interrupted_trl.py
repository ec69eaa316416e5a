"""Trainings by trl that something happens to, each in a process of its own; see `interrupted_training`."""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from happenings import before, is_at, kill, run_out

# Each is a process that is started anew: the server of forked processes is that of evaluations.
PROCESSES = multiprocessing.get_context("spawn")


def train_and_end(recipe: Path, save_every: int = 1000, happens: str = "", step: int = 0, **options: Any) -> int:
    """Train with a state saved every so many steps, let something happen after a step, and return the exit code.

    `happens` may end with `:RANK`, and happens to that process of several.
    """
    process = PROCESSES.Process(target=_train, args=(recipe, save_every, happens, step), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(recipe: Path, save_every: int, happens: str, step: int, **options: Any) -> None:
    from lorasweep.trainers import TrainingError, processes
    from lorasweep.trainers.trl import run

    gc.freeze()
    log = (recipe.parent / "train.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    prepare(save_every, happens, step)
    processes.start_processes = lambda work, arguments, count, join: _fork(
        (save_every, happens, step), work, arguments, count, join
    )
    try:
        run.train(recipe, recipe.parent / "adapter", **options)
    except TrainingError as error:
        raise SystemExit(f"train: {error}") from error


def prepare(save_every: int, happens: str, step: int) -> None:
    """Have this process save its state every so many steps, and something happen to it."""
    import torch

    from lorasweep.trainers import frame, saved_states
    from lorasweep.trainers.trl import loop

    torch.set_num_threads(1)
    reporter, trainer = loop._Reporter, loop._Trainer
    what, _, rank = happens.partition(":")
    whole = reporter.on_step_end

    def end_step(self: Any, args: Any, state: Any, control: Any, **named: Any) -> Any:
        self._save_minutes = 0 if state.global_step % save_every == 0 else 1e9
        return whole(self, args, state, control, **named)

    reporter.on_step_end = end_step
    if rank and rank != os.environ.get("RANK"):
        return
    is_now = lambda self: self.state.global_step == step  # noqa: E731
    if what == "killed in a step":
        before(trainer, "training_step", lambda self, *_: kill() if is_now(self) else None)
    elif what == "out of memory":
        before(trainer, "training_step", lambda self, *_: run_out() if is_now(self) else None)
    elif what == "told to stop":
        to = os.getppid() if rank else os.getpid()
        before(trainer, "training_step", lambda self, *_: os.kill(to, signal.SIGTERM) if is_now(self) else None)
    elif what == "killed before it is saved":
        before(reporter, "on_save", lambda self, args, state, *_, **__: kill() if state.global_step == step else None)
    elif what == "killed at the end of an epoch":
        before(loop, "_export", lambda model, folder, *_: kill() if folder.name == f"epoch_{step}" else None)
    elif what == "killed before it is published":
        before(frame, "_collect", lambda *_: kill())
    elif what == "killed while a state is written":
        before(saved_states, "_digest", lambda file: kill() if is_at(file, step) else None)


def _fork(prepared: tuple[int, str, int], work: Any, arguments: tuple[Any, ...], count: int, join: bool) -> Any:
    from torch.multiprocessing import start_processes

    return start_processes(_work, (prepared, work, *arguments), count, join, start_method="fork")


def _work(rank: int, prepared: tuple[int, str, int], work: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of whoever forked it is not of this process
    os.environ["RANK"] = str(rank)
    prepare(*prepared)
    work(rank, *arguments)
