"""The argument of the subcommands that names an experiment: its file, or its folder of results."""

import argparse
from pathlib import Path

from lorasweep.experiment.loading import load_experiment, read_config
from lorasweep.sweep.sweep import RESULTS

DEFAULT = Path("config/experiment.yaml")
"""The experiment that Snakemake runs without `--configfile`."""


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names the experiment."""
    parser.add_argument(
        "experiment", nargs="?", type=Path, default=DEFAULT, help=f"the experiment's file (default: {DEFAULT})"
    )


def add_results(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names an experiment by its file or by its results."""
    parser.add_argument(
        "experiment",
        nargs="?",
        type=Path,
        default=DEFAULT,
        help=f"the experiment's file (default: {DEFAULT}), or its folder of results",
    )


def find_results(file: Path) -> Path:
    """Return the folder of results of an experiment, given the experiment's file or the folder itself.

    Raises:
        InputError: the file is not an experiment.
    """
    if file.is_dir():
        return file
    return RESULTS / load_experiment(read_config(file), str(file)).experiment.name
