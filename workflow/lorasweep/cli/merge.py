"""Merge an adapter into its base model. The result is bit-identical to that of PEFT's `merge_and_unload`."""

import argparse
import subprocess
import sys
from pathlib import Path

from lorasweep.cli.job.merge import add_arguments

__all__ = ["add_arguments", "run"]

ROOT = Path(__file__).parents[3]


def run(arguments: argparse.Namespace) -> None:
    # The packages for merging are installed in the evaluation environment only.
    command = [str(ROOT / "scripts/run"), "eval", "-m", "lorasweep", "job", "merge", *sys.argv[2:]]
    sys.exit(subprocess.run(command).returncode)
