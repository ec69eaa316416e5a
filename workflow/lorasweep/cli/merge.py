"""Make one model of a base model and an adapter: bit for bit what PEFT's `merge_and_unload` gives."""

import argparse
import subprocess
import sys
from pathlib import Path

from lorasweep.cli.job.merge import add_arguments

__all__ = ["add_arguments", "run"]

ROOT = Path(__file__).parents[3]


def run(arguments: argparse.Namespace) -> None:
    # What can merge is in the environment of the evaluation alone.
    command = [str(ROOT / "scripts/run"), "eval", "-m", "lorasweep", "job", "merge", *sys.argv[2:]]
    sys.exit(subprocess.run(command).returncode)
