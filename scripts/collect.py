"""Make the table of results from the manifests of the points."""

import argparse
import json
from pathlib import Path

from lorasweep.points import BASELINE
from lorasweep.table import make_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--variables", nargs="*", default=[], help="the keys that vary: a column each")
    parser.add_argument(
        "--baseline", action="append", nargs="?", const=BASELINE, default=[], help="a model that was evaluated as it is"
    )
    parser.add_argument("--output", type=Path, required=True, help="the table, as CSV")
    arguments = parser.parse_args()
    record = json.loads((arguments.results / "points.json").read_text())
    points = [*arguments.baseline, *(name for name, entry in record.items() if entry["current"])]
    make_table(arguments.results, points, arguments.variables).to_csv(arguments.output, index=False)


if __name__ == "__main__":
    main()
