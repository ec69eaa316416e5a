"""The argument of the subcommands that names an experiment: its file, or its folder of results."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from lorasweep.experiment.loading import load_experiment
from lorasweep.sweep.sweep import RESULTS
from lorasweep.util.errors import InputError

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


def read_config(file: Path) -> dict[str, Any]:
    """Return an experiment's file as a plain mapping.

    Raises:
        InputError: there is no such file, or it is not YAML.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file", f"an experiment's file, such as {DEFAULT}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{file}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: not an experiment", "YAML with the keys of config/README.md")
    return content


def find_results(file: Path) -> Path:
    """Return the folder of results of an experiment, given the experiment's file or the folder itself.

    Raises:
        InputError: the file is not an experiment.
    """
    if file.is_dir():
        return file
    return RESULTS / load_experiment(read_config(file), str(file)).experiment.name
