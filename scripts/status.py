"""Show how far an experiment's run is: `snakemake status` starts this. In a terminal it stays until the run ends."""

import argparse
from pathlib import Path

from rich.console import Console

from lorasweep.status_view import watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="an experiment's folder: results/<experiment>")
    arguments = parser.parse_args()
    watch(arguments.results, Console(highlight=False))


if __name__ == "__main__":
    main()
