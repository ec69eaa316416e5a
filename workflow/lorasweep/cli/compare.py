"""Compare finished experiments that have a task in common: settings, gains over their base models, the best ones.

Each task must be the same in what the evaluations recorded: its source files, arguments, limit, epochs, solver, scorer
and judges. Samples are paired where they are the same. Nothing is written without an option.
"""

import argparse
from pathlib import Path

import pandas as pd
from rich.console import Console

from lorasweep.cli.experiments import find_results
from lorasweep.results.comparison import compare, read_experiments, show_comparison
from lorasweep.results.comparison_page import make_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiments", nargs="+", type=Path, help="the experiments' folders of results, or their files; two or more"
    )
    parser.add_argument("--task", help="the task to compare on (default: all common ones)")
    parser.add_argument("--metric", help="the metric, as <score>/<metric> (default: the one that decides the first)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a page in HTML that works offline")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")


def run(arguments: argparse.Namespace) -> None:
    experiments = read_experiments([find_results(path) for path in arguments.experiments])
    comparisons = compare(experiments, arguments.task, arguments.metric)
    console = Console()
    for comparison in comparisons:
        show_comparison(comparison, console)
    if arguments.csv:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.concat([comparison.rows for comparison in comparisons]).to_csv(arguments.csv, index=False)
    if arguments.page:
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        make_page(experiments, comparisons, arguments.page)
        console.print(f"\nThe page: {arguments.page.resolve()}", highlight=False, soft_wrap=True)
