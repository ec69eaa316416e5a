"""End a job's process in order when it is cancelled or preempted."""

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from lorasweep.util.slurm import requeue_if_preempted

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that sets the signal to send to this process when its parent ends."""

_SECONDS_TO_END = 30
"""Seconds that a job has to end in order. This is the default of SLURM's KillWait."""


def end_on_sigterm(outlives_parent: bool = False) -> None:
    """Make SIGTERM end the job like an error, so that locks are released and temporary files removed.

    A preempted job is requeued. When a job is cancelled, Snakemake ends only the job's shell, and some clusters lose
    track of its children. So the end of the parent counts as SIGTERM too, unless `outlives_parent`.
    """
    signal.signal(signal.SIGTERM, _end)
    if not outlives_parent:
        get_signal_at_parents_end(signal.SIGTERM)


@contextmanager
def noticing_sigterm(notice: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Call a function at each SIGTERM inside the block, which ends by itself then, with an error that says so.

    SLURM sends SIGTERM twice, to the job's step and to the job. The second one must not end the process on the way out,
    before the error is told. So once such a block has failed, further ones are ignored. The block gets a function that
    returns whether there was a SIGTERM.
    """
    is_told = False

    def note(*_: Any) -> None:
        nonlocal is_told
        is_told = True
        notice()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: is_told
    except BaseException:
        signal.signal(signal.SIGTERM, _ignore if is_told else before)
        raise
    signal.signal(signal.SIGTERM, before)


def _ignore(*_: Any) -> None:
    """Do nothing. Unlike SIG_IGN, which children would inherit."""


def get_signal_at_parents_end(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # Python swallows SystemExit in a finalizer, and the job would then run on. The alarm ends it.
    signal.alarm(_SECONDS_TO_END)
    if message := requeue_if_preempted():
        print(message, flush=True)
    sys.exit(128 + number)
