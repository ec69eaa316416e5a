"""A training that something happens to, in a process of its own: for tests of what the next one makes of it."""

import os
import signal
from pathlib import Path
from typing import Any

from forked_training import PROCESSES, prepare
from happenings import before, is_at, kill, run_out


def train_and_end(
    recipe: Path, save_every: int = 1, happens: str = "", step: int = 0, processes: Any = PROCESSES, **options: Any
) -> int:
    """Train with a state saved every so many steps, let something happen at a step, and return the exit code.

    A training on a GPU needs `processes` that are spawned: CUDA does not work in one that was forked.
    """
    process = processes.Process(target=_train, args=(recipe, save_every, happens, step), kwargs=options)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _train(recipe: Path, save_every: int, happens: str, step: int, **options: Any) -> None:
    from lorasweep.trainers import TrainingError, frame, saved_states
    from lorasweep.trainers.torchtune import loop as torchtune_recipe
    from lorasweep.trainers.torchtune import run as torchtune

    prepare()
    log = (recipe.parent / "train.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torchtune_recipe.Recipe._is_due = lambda self: self.global_step % save_every == 0
    if happens == "killed while a state is written":
        before(saved_states, "_digest", lambda file: kill() if is_at(file, step) else None)
    elif happens == "killed before it is published":
        before(frame, "_collect", lambda *_: kill())
    elif happens:
        method, do = {
            "killed in a step": ("_loss_step", lambda self, *_: kill() if self.global_step == step else None),
            "killed before it is saved": ("_save", lambda self: kill() if self.global_step == step else None),
            "killed at the end of an epoch": (
                "save_checkpoint",
                lambda self, epoch: kill() if epoch == step else None,
            ),
            "told to stop": ("_count_tokens", lambda self, *_: _tell() if self.global_step == step else None),
            "over its memory": (
                "_loss_step",
                lambda self, *_: _take_memory(recipe) if self.global_step == step else None,
            ),
            "has so many bytes of its GPU": ("setup", lambda self, *_: _limit_memory(step)),
            "out of memory": ("_loss_step", lambda self, *_: run_out() if self.global_step == step else None),
        }[happens]
        before(torchtune_recipe.Recipe, method, do)
    try:
        torchtune.train(recipe, recipe.parent / "adapter", **options)
    except TrainingError as error:
        raise SystemExit(f"train: {error}") from error


def _tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _take_memory(recipe: Path) -> None:
    """Take a gigabyte in the cgroup whose path lies beside the recipe."""
    Path((recipe.parent / "cgroup").read_text(), "cgroup.procs").write_text(str(os.getpid()))
    bytearray(10**9)


def _limit_memory(size: int) -> None:
    import torch

    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
