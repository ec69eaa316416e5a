"""The job `train` and torchtune's own command, forked from a process that has imported torchtune.

A training in several processes forks these too, where a real one starts each anew.
"""

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forked_python
from forked_python import PROCESSES

PROCESSES.set_forkserver_preload(
    [
        "lorasweep.trainers.torchtune.run",
        "lorasweep.trainers.torchtune.tokenizer",
        "lorasweep.trainers.torchtune.dataset",
        "lorasweep.trainers.processes",
        "lorasweep.trainers.torchtune.loop",
        "lorasweep.util.versions",
        "torch.utils.tensorboard",
        "torchtune._cli.tune",
        "torchtune.models.llama3",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.configuration_llama",
        "transformers.tokenization_utils_tokenizers",
    ]
)


def call(
    program: str | Path, arguments: Sequence[Any], environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """Call a script, or a module by its name; return what it printed and its exit status."""
    return forked_python.call(program, arguments, environment=environment, prepare=_prepare)


def prepare() -> None:
    """Have a process that was forked compute on one thread, and collect no garbage among what it imported."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()


def _prepare() -> None:
    from lorasweep.trainers import processes

    prepare()
    processes.start_processes = _fork_processes


def _fork_processes(work: Callable[..., None], arguments: tuple[Any, ...], count: int, join: bool) -> Any:
    from torch.multiprocessing import start_processes

    return start_processes(_work, (work, *arguments), count, join, start_method="fork")


def _work(rank: int, work: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the handler of whoever forked it is not of this process
    work(rank, *arguments)
