"""Use a training's adapter as the adapter of a point."""

import argparse
from pathlib import Path

from lorasweep.adapters.take import take_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="directory of the training's adapter")
    parser.add_argument("--recipe", type=Path, required=True, help="the training's recipe")
    parser.add_argument("--state", type=Path, required=True, help="folder of the training's temporary files")
    parser.add_argument("--choice", help="digest of the evaluations by which the run had planned to choose the epoch")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")


def run(arguments: argparse.Namespace) -> None:
    take_adapter(**vars(arguments))
