"""Make the report of an experiment, a single page that works offline, and its plots."""

import argparse
import json
from pathlib import Path

from lorasweep.results.manifest import list_points
from lorasweep.results.report import make_report
from lorasweep.results.tables_record import digest_sources
from lorasweep.util.files import write_record


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
    parser.add_argument("--record", type=Path, help="the file to write that says what the report was made of")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings by rule as JSON, for the record")
    parser.add_argument("--baselines", nargs="*", default=[], help="names of the baselines, for the record")


def run(arguments: argparse.Namespace) -> None:
    results = arguments.table.parent
    points = list_points(results, arguments.baselines) if arguments.record else []
    sources = digest_sources(results, points, arguments.settings)
    make_report(arguments.table, arguments.pipeline, arguments.output, arguments.plots)
    if arguments.record:
        write_record(arguments.record, sources)
