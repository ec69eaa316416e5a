"""Print an experiment's ledger: what it kept and spent, beside its plan. It is renewed every minute of a run."""

import argparse
from pathlib import Path

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lorasweep.ledger import LEDGER, TOTAL, describe_ledger
from lorasweep.plan_view import format_bytes, format_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="an experiment's folder: results/<experiment>")
    arguments = parser.parse_args()
    # Of a point the columns of the total are empty, and of the total the mode.
    rows = pd.read_csv(arguments.results / LEDGER).fillna({"mode": ""}).fillna(0).to_dict("records")
    table = Table(title=f"{arguments.results.name}: the ledger", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("point", "mode", "kept", "planned", "jobs", "planned", "failed", "GPU hours"):
        is_text = column in ("point", "mode")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "point", overflow="fold")
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


if __name__ == "__main__":
    main()
