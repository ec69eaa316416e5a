"""Print an experiment's answer and its table of results, and where to look next."""

import argparse
import json
from pathlib import Path

import pandas as pd
from rich.console import Console

from lorasweep.table import show_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="an experiment's folder: results/<experiment>")
    results = parser.parse_args().results
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


if __name__ == "__main__":
    main()
