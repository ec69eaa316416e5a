"""Check the files that a point keeps, remove its temporary files, and write its manifest."""

import argparse
import json
from pathlib import Path

from lorasweep.results.manifest import clean_up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--benchmarks", type=Path, required=True, help="Snakemake's measurements, by rule and point")
    parser.add_argument("--settings", type=json.loads, required=True, help="the point's settings and mode, as JSON")
    parser.add_argument("--tasks", nargs="*", default=[], help="the tasks that the point is evaluated on")
    parser.add_argument("--evaluation", help="the digest of the evaluation that the run had planned")
    parser.add_argument("--training", help="the training whose time is counted for the point")


def run(arguments: argparse.Namespace) -> None:
    clean_up(**vars(arguments))
