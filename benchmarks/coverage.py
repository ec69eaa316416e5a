"""How often intervals cover the truth, and tests find a difference that is not there, by number of seeds.

    .venv/driver/bin/python benchmarks/coverage.py

Each row draws scores of 0 and 1 from known shares: samples differ in how hard they are, and seeds in how good their
training is. `share`: a metric's interval. `gain`: that of its difference to the base model. `found`: how often two
settings that are alike differ at the level of 5 %. The last columns are median widths of the intervals of the share.
"""

import argparse
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests")]
from lorasweep.results.inference import get_difference_interval, get_mean_interval, get_p_value  # noqa: E402
from simulated_scores import Simulation  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="simulated experiments of each row; a fifth is tested")
    draws = parser.parse_args().draws
    print("| share | samples | sd of seeds | seeds | share covered | gain covered | difference found | width |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for share, samples, spread, seeds in product((0.5, 0.9), (40, 200), (0.0, 0.5, 1.0), (1, 2, 3, 5)):
        if seeds > 1 or spread == 0:
            figures = describe(Simulation(share, seeds, samples, spread, gain=0.5), draws)
            print(f"| {share} | {samples} | {spread} | {seeds} {figures}", flush=True)
    print("\n| 200 samples, 5 a cluster | share | seeds | share covered | gain covered | difference found | width |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for share, seeds, is_told in product((0.5, 0.9), (1, 3), (False, True)):
        simulation = Simulation(share, seeds, 200, 0.5 * (seeds > 1), 1.5, size=5, gain=0.5)
        told = "`report.cluster`" if is_told else "taken as independent"
        print(f"| {told} | {share} | {seeds} {describe(simulation, draws, is_told)}", flush=True)


def describe(simulation: Simulation, draws: int, knows_clusters: bool = True) -> str:
    shares, gains, found, widths = [], [], [], []
    gain = simulation.truth - simulation.base_truth
    for index, drawn in enumerate(simulation.draw(draws)):
        scores, alike, base = drawn if knows_clusters else (replace(each, clusters=None) for each in drawn)
        interval, difference = get_mean_interval(scores), get_difference_interval(scores, base)
        assert interval is not None
        assert difference is not None
        shares.append(interval.low <= simulation.truth <= interval.high)
        gains.append(difference.low <= gain <= difference.high)
        widths.append(interval.high - interval.low)
        if index % 5 == 0:
            p_value = get_p_value(scores, alike)
            assert p_value is not None
            found.append(p_value < 0.05)
    figures = [f"{np.mean(values):.1%}" for values in (shares, gains, found)]
    return f"| {' | '.join(figures)} | {np.median(widths):.2f} |"


if __name__ == "__main__":
    main()
