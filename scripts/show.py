"""Print an experiment's answer and its table of results, and where to look next."""

import argparse
import json
import re
from pathlib import Path

import pandas as pd
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from lorasweep.table import show_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="an experiment's folder: results/<experiment>")
    parser.add_argument("--svg", type=Path, help="write the table to this picture too")
    arguments = parser.parse_args()
    table = pd.read_parquet(arguments.results / "results.parquet")
    answer = json.loads((arguments.results / "answer.json").read_text())
    console = Console(record=True, width=76 if arguments.svg else None)
    show_table(table, arguments.results.name, console)
    console.print(f"\n{answer['sentence']}", highlight=False)
    if arguments.svg:
        # Without the fonts that it would fetch from elsewhere.
        picture = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        console.save_svg(str(arguments.svg), title="make demo", code_format=picture)
    console.print(
        f"\nThe report: {(arguments.results / 'report.html').resolve()}\n"
        f"The table: {arguments.results}/results.csv\n"
        f"Every sample: .venv/eval/bin/inspect view --log-dir {arguments.results}\n"
        f"A point: {arguments.results}/<point>/ holds recipe.yaml, adapter/, eval/ and manifest.json",
        highlight=False,
    )


if __name__ == "__main__":
    main()
