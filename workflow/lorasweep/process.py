"""How a job's process ends."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""prctl(2): which signal the kernel sends when the parent is gone."""


def end_on_sigterm() -> None:
    """Let a cancelled job end as on an error: what it holds is released, and what it wrote aside goes with it.

    Snakemake ends the shell of a job that is cancelled, and not what that has started, which some clusters then lose
    sight of: so the end of the shell counts as the signal too.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
