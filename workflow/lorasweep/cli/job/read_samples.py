"""Read the scores of every sample from the logs of an experiment's points."""

import argparse
from pathlib import Path

from lorasweep.results.manifest import find_logs, list_points
from lorasweep.results.samples import read_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--baselines", nargs="*", default=[], help="the points that are a base model")
    parser.add_argument("--points", nargs="*", help="the points to take; by default all of the experiment")
    parser.add_argument("--output", type=Path, required=True, help="a row a sample, epoch and score, as Parquet")


def run(arguments: argparse.Namespace) -> None:
    points = arguments.points or list_points(arguments.results, arguments.baselines)
    read_samples(find_logs(arguments.results, points)).to_parquet(arguments.output, index=False)
