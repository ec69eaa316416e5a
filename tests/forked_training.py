"""scripts/train.py and torchtune's own command without the seconds that each takes to import torchtune.

Each call is a process, forked from one that has imported torchtune and computed nothing, with an environment of its
own. A training in several processes forks these too, where a real one starts each anew.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

PROCESSES = multiprocessing.get_context("forkserver")
# What takes long to import is there in each process from its start; nothing has computed there, so forking is safe.
PROCESSES.set_forkserver_preload(
    ["lorasweep.trainers.torchtune_recipe", "lorasweep.trainers.torchtune_processes", "torch.utils.tensorboard"]
)


def call(
    program: str | Path, arguments: Sequence[Any], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Call a script, or a module by its name; return what it printed and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        command = [str(program), *map(str, arguments)]
        process = PROCESSES.Process(target=_become, args=(command, dict(environment), str(output), str(errors)))
        process.start()
        process.join()
        assert process.exitcode is not None
        said = [file.read_text(encoding="utf-8") for file in (output, errors)]
        return subprocess.CompletedProcess(command, process.exitcode, *said)


def _become(command: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """Be the process that was asked for."""
    for file, descriptor in ((output, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from lorasweep.trainers import torchtune_processes

    torch.set_num_threads(1)
    torchtune_processes.start_processes = _fork_processes
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _fork_processes(work: Callable[..., None], arguments: tuple[Any, ...], count: int, join: bool) -> Any:
    from torch.multiprocessing import start_processes

    return start_processes(_work, (work, *arguments), count, join, start_method="fork")


def _work(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of whoever forked it is not of this process
    work(rank, *arguments)
