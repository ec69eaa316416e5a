"""Print an experiment's answer and table of results, and the paths of its report, tables and logs."""

import argparse
import json

import pandas as pd
from rich.console import Console

from lorasweep.cli.experiments import add_results, find_results
from lorasweep.results.table import show_table
from lorasweep.util.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)


def run(arguments: argparse.Namespace) -> None:
    results = find_results(arguments.experiment)
    if not (results / "results.parquet").is_file():
        raise InputError(f"{results}: no table of results yet; 'lorasweep status' shows how far the run is")
    console = Console()
    show_table(pd.read_parquet(results / "results.parquet"), results.name, console)
    answer = json.loads((results / "answer.json").read_text(encoding="utf-8"))
    console.print(
        f"\n{answer['sentence']}\n\n"
        f"The report: {(results / 'report.html').resolve()}\n"
        f"The tables: {results}/results.csv, {results}/replicates.csv\n"
        f"Every sample: .venv/eval/bin/inspect view --log-dir {results}\n"
        f"A point: {results}/<point>/ holds recipe.yaml, adapter/, eval/ and manifest.json",
        highlight=False,
        soft_wrap=True,
    )
