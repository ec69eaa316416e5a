"""Make the report of an experiment, one page that opens offline, and its plots."""

import argparse
import json
from pathlib import Path

from lorasweep.results.report import make_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", type=Path, required=True, help="the table of points, with its companions beside it")
    parser.add_argument(
        "--pipeline", type=json.loads, required=True, help="the rules, their jobs and what they follow, as JSON"
    )
    parser.add_argument("--output", type=Path, required=True, help="the page")
    parser.add_argument("--plots", type=Path, required=True, help="the folder of the plots")


def run(arguments: argparse.Namespace) -> None:
    make_report(arguments.table, arguments.pipeline, arguments.output, arguments.plots)
