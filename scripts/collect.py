"""Make the tables of results, and the answer that they give, from the manifests and the samples' scores."""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from lorasweep.answer import choose_metric, find_answer
from lorasweep.errors import InputError
from lorasweep.experiment import Report
from lorasweep.files import write_aside
from lorasweep.layout import EXPERIMENT
from lorasweep.manifest import list_points
from lorasweep.replicates import aggregate
from lorasweep.table import SampleScores, make_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--samples", type=Path, help="the samples' scores, as Parquet")
    parser.add_argument("--variables", nargs="*", default=[], help="the keys that vary: a column each")
    parser.add_argument("--tasks", nargs="*", default=[], help="the tasks, the one that decides first")
    parser.add_argument(
        "--report", type=Report.model_validate_json, required=True, help="the section `report`, as JSON"
    )
    parser.add_argument("--baselines", nargs="*", default=[], help="the points that are a base model")
    parser.add_argument("--points", nargs="*", help="the points to take; by default all of the experiment")
    parser.add_argument(
        "--output", type=Path, required=True, help="the table of points, as CSV; the others lie beside it"
    )
    arguments = parser.parse_args()
    report, output = arguments.report, arguments.output
    try:
        points = arguments.points or list_points(arguments.results, arguments.baselines)
        samples = pd.read_parquet(arguments.samples) if arguments.samples else None
        scores = SampleScores(samples)
        table = make_table(arguments.results, points, arguments.variables, scores, report.confidence)
        settings = aggregate(table, arguments.variables, scores, report.confidence)
        task = next(iter(arguments.tasks), None)
        metric = choose_metric(table, arguments.tasks, report.metric, str(arguments.results / EXPERIMENT))
        answer = find_answer(table, settings, scores, task, metric, report.higher_is_better, report.confidence)
    except InputError as error:
        sys.exit(f"collect: {error}")
    table.to_parquet(output.with_suffix(".parquet"), index=False)
    settings.to_csv(output.with_name(output.name.replace("results", "replicates")), index=False)
    answer_file = output.with_name(output.name.replace("results", "answer")).with_suffix(".json")
    write_aside(answer_file, json.dumps(answer.as_plain() | {"variables": arguments.variables}, indent=1) + "\n")
    table.to_csv(output, index=False)


if __name__ == "__main__":
    main()
