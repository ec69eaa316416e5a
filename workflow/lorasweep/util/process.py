"""End a job's process in order when it is cancelled or preempted."""

import ctypes
import signal
import sys
from types import FrameType
from typing import NoReturn

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
