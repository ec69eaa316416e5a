"""How a job's process ends."""

import ctypes
import signal
import sys
from types import FrameType
from typing import NoReturn

from lorasweep.util.slurm import requeue_if_preempted

_PR_SET_PDEATHSIG = 1
"""prctl(2): which signal the kernel sends when the parent is gone."""

_SECONDS_TO_END = 30
"""How long a job has to end in order; the default of SLURM's KillWait."""


def end_on_sigterm(outlives_parent: bool = False) -> None:
    """Let a cancelled job end as on an error: what it holds is released, and what it wrote aside goes with it.

    One that has to give way to another is queued again. Snakemake ends the shell of a job that is cancelled, and not
    what that has started, which some clusters then lose sight of: so the end of the shell counts as the signal too,
    unless this process outlives its parent.
    """
    signal.signal(signal.SIGTERM, _end)
    if not outlives_parent:
        get_signal_at_parents_end(signal.SIGTERM)


def get_signal_at_parents_end(number: int) -> None:
    """Have the kernel send this process a signal when its parent is gone; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # An exit is lost where Python swallows it, as in a finalizer: such a job went on as if nothing had been said.
    signal.alarm(_SECONDS_TO_END)
    if said := requeue_if_preempted():
        print(said, flush=True)
    sys.exit(128 + number)
