"""Read the scores of every sample from the logs of an experiment's points."""

import argparse
from pathlib import Path

from lorasweep.manifest import find_logs, list_points
from lorasweep.samples import read_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--baselines", nargs="*", default=[], help="the points that are a base model")
    parser.add_argument("--points", nargs="*", help="the points to take; by default all of the experiment")
    parser.add_argument("--output", type=Path, required=True, help="a row a sample, epoch and score, as Parquet")
    arguments = parser.parse_args()
    points = arguments.points or list_points(arguments.results, arguments.baselines)
    read_samples(find_logs(arguments.results, points)).to_parquet(arguments.output, index=False)


if __name__ == "__main__":
    main()
