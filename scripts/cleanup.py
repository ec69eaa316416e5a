"""Check what a point keeps, remove what it need not, and write its manifest."""

import argparse
import json
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.manifest import clean_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--benchmarks", type=Path, required=True, help="Snakemake's measurements, by rule and point")
    parser.add_argument("--settings", type=json.loads, required=True, help="the point's settings and mode, as JSON")
    parser.add_argument("--tasks", nargs="*", default=[], help="the tasks that the point is evaluated on")
    arguments = parser.parse_args()
    try:
        workflow = Path(__file__).parents[1]
        clean_up(arguments.point, arguments.settings, arguments.tasks, arguments.benchmarks, workflow)
    except (InputError, OSError) as error:
        sys.exit(f"cleanup: {error}")


if __name__ == "__main__":
    main()
