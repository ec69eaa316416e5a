"""Print an experiment's ledger: disk space and time used, beside the plan. A run updates it every minute."""

import argparse

import pandas as pd
from rich.console import Console

from lorasweep.cli.experiments import add_results, find_results
from lorasweep.layout import LEDGER
from lorasweep.running.ledger import TOTAL, describe_ledger
from lorasweep.util.errors import InputError
from lorasweep.util.formats import format_bytes, format_seconds
from lorasweep.util.tables import FoldingTable
from lorasweep.util.usage import USAGE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)


def run(arguments: argparse.Namespace) -> None:
    results = find_results(arguments.experiment)
    if not (results / LEDGER).is_file():
        raise InputError(f"{results}: no ledger yet; the first run writes it")
    costs = pd.read_csv(results / LEDGER)
    # Columns of the total are empty in rows of points; the mode is empty in the total. What is not known stays empty.
    costs = costs.fillna({column: "" if column == "mode" else 0 for column in costs if column not in USAGE})
    rows = [dict(zip(costs.columns, row, strict=True)) for row in costs.itertuples(index=False)]
    columns = ("point", "mode", "kept", "planned", "jobs", "planned", "failed", "GPU hours")
    table = FoldingTable(columns, texts=["mode"], title=f"{results.name}: the ledger")
    for row in rows:
        table.add_row(
            str(row["point"]),
            str(row["mode"]),
            format_bytes(row["kept_bytes"]),
            format_bytes(row["planned_kept_bytes"]),
            format_seconds(row["job_seconds"]),
            format_seconds(row["planned_job_seconds"]),
            format_seconds(row["failed_seconds"]) if row["failed_attempts"] else "-",
            f"{row['gpu_hours']:,.2f}",
            style="bold" if row["point"] == TOTAL else None,
        )
    console = Console()
    console.print(table)
    console.print(describe_ledger(rows), highlight=False)
