"""Make the report of an experiment, a single page that works offline, and its plots."""

import argparse
import json
from pathlib import Path

from lorasweep.results.report import make_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--table", type=Path, required=True, help="the table of points, in one folder with the other tables"
    )
    parser.add_argument(
        "--pipeline",
        type=json.loads,
        required=True,
        help="the rules, their number of jobs and the rules before them, as JSON",
    )
    parser.add_argument("--output", type=Path, required=True, help="the page to write")
    parser.add_argument("--plots", type=Path, required=True, help="the folder for the plots")


def run(arguments: argparse.Namespace) -> None:
    make_report(arguments.table, arguments.pipeline, arguments.output, arguments.plots)
