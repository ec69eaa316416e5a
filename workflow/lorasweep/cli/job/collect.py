"""Make the tables of results and the answer from the manifests and the samples' scores."""

import argparse
import json
from pathlib import Path

import pandas as pd

from lorasweep.experiment.sections import Report
from lorasweep.layout import EXPERIMENT
from lorasweep.results.answer import choose_metric, find_answer
from lorasweep.results.manifest import check_manifests, list_points
from lorasweep.results.replicates import aggregate
from lorasweep.results.table import SampleScores, make_table
from lorasweep.util.errors import naming_file
from lorasweep.util.files import write_aside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--samples", type=Path, help="the samples' scores, as Parquet")
    parser.add_argument("--variables", nargs="*", default=[], help="the keys that vary, each of which becomes a column")
    parser.add_argument("--tasks", nargs="*", default=[], help="the tasks; the first decides which point is best")
    parser.add_argument(
        "--report", type=Report.model_validate_json, required=True, help="the section `report`, as JSON"
    )
    parser.add_argument("--baselines", nargs="*", default=[], help="names of the baselines")
    parser.add_argument("--points", nargs="*", help="the points to include (default: all of the experiment)")
    parser.add_argument(
        "--output", type=Path, required=True, help="the table of points, as CSV; the other files are written beside it"
    )


def run(arguments: argparse.Namespace) -> None:
    report, output = arguments.report, arguments.output
    points = arguments.points or list_points(arguments.results, arguments.baselines)
    check_manifests(arguments.results, points)
    samples = pd.read_parquet(arguments.samples) if arguments.samples else None
    scores = SampleScores(samples)
    table = make_table(arguments.results, points, arguments.variables, scores, report.confidence)
    settings = aggregate(table, arguments.variables, scores, report.confidence)
    task = next(iter(arguments.tasks), None)
    with naming_file(arguments.results / EXPERIMENT):
        metric = choose_metric(arguments.results, table, arguments.tasks, report.metric)
    asked = (arguments.variables, task, metric, report.higher_is_better, report.confidence, report.cluster)
    answer = find_answer(table, settings, scores, *asked)
    table.to_parquet(output.with_suffix(".parquet"), index=False)
    settings.to_csv(output.with_name(output.name.replace("results", "replicates")), index=False)
    answer_file = output.with_name(output.name.replace("results", "answer")).with_suffix(".json")
    write_aside(answer_file, json.dumps(answer.as_plain() | {"variables": arguments.variables}, indent=1) + "\n")
    table.to_csv(output, index=False)
