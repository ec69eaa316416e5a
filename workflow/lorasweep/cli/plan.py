"""Show the jobs of a run, its disk space and its hours, and compare the modes of keeping checkpoints.

This is a dry run of Snakemake. Further arguments are passed to Snakemake, such as `--jobs 20` or
`--config evaluation='{merge_adapters: false}'`.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from lorasweep.cli.experiments import add_experiment
from lorasweep.experiment.loading import read_config
from lorasweep.layout import WANTED_PLAN

ROOT = Path(__file__).parents[3]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("snakemake", nargs=argparse.REMAINDER, help="further arguments, passed to Snakemake")


def run(arguments: argparse.Namespace) -> None:
    read_config(arguments.experiment)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--configfile", str(arguments.experiment), "--dry-run", "--quiet", "rules", *arguments.snakemake]
    sys.exit(subprocess.run(command, env={**os.environ, WANTED_PLAN: "whole"}).returncode)
