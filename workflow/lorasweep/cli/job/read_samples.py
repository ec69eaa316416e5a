"""Read the scores of all samples from the logs of an experiment's points."""

import argparse
from pathlib import Path

from lorasweep.layout import EXPERIMENT
from lorasweep.results.manifest import find_logs, list_points
from lorasweep.results.samples import read_samples
from lorasweep.util.errors import naming_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--baselines", nargs="*", default=[], help="names of the baselines")
    parser.add_argument("--points", nargs="*", help="the points to include (default: all of the experiment)")
    parser.add_argument("--cluster", help="the key of the samples' metadata that tells which belong together")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file: one row per sample, epoch and score")


def run(arguments: argparse.Namespace) -> None:
    points = arguments.points or list_points(arguments.results, arguments.baselines)
    with naming_file(arguments.results / EXPERIMENT):
        samples = read_samples(find_logs(arguments.results, points), arguments.cluster)
    samples.to_parquet(arguments.output, index=False)
