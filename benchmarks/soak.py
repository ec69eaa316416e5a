"""A sweep on SLURM while a monkey kills its jobs, nodes and controller: does it give what an undisturbed one gives?

    make install-test && python3 tests/slurm/cluster.py install && .venv/driver/bin/python benchmarks/soak.py

30 points of a tiny model (ten seeds in each mode) run undisturbed on this machine, and then on a SLURM of four nodes
that is started for it, for ten minutes with the monkey and to their end without. Compared are the adapters, their
training logs without times, the merged models' digests, the metrics, the scores of every sample and the rows of the
tables, bit for bit; and what should be gone is looked for. Printed are the kills by kind, and what was found. Exit
status: 0 if nothing was.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests"), str(ROOT / "tests/slurm")]
from cluster import Cluster  # noqa: E402
from monkey import (  # noqa: E402
    ONE_THREAD,
    RESOURCES,
    SAVED_OFTEN,
    SETTINGS,
    Monkey,
    find_differences,
    find_leftovers,
    wait_until_idle,
)
from slurm_sweep import SlurmSweep  # noqa: E402
from sweep import MODES, Sweep, make_sweep, run_stage  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of what the monkey does")
    parser.add_argument("--seeds", type=int, default=10, help="points in each of the three modes")
    parser.add_argument("--minutes", type=float, default=10, help="that the monkey has")
    parser.add_argument("--jobs", type=int, default=8, help="at a time")
    parser.add_argument(
        "--folder", type=Path, help="where all is done and stays, to be gone on with; else a temporary one"
    )
    arguments = parser.parse_args()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        sys.exit(soak(arguments.folder, arguments))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        sys.exit(soak(Path(folder), arguments))


def soak(folder: Path, arguments: argparse.Namespace) -> int:
    """Return how much was found to be wrong."""
    model = folder / "model"
    if not model.exists():
        run_stage("train", "tiny_model.py", "--family", "llama3", "--output", model)
    undisturbed = make(folder / "undisturbed", model, arguments.seeds)
    began = time.monotonic()
    undisturbed.run("--cores", "2", *ONE_THREAD)
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    plain = make(folder / "disturbed", model, arguments.seeds)
    tmp = folder / "tmp"
    tmp.mkdir(exist_ok=True)
    sweep = SlurmSweep(plain.directory, plain.config, {"TMPDIR": str(tmp)})
    disturb(sweep, folder / "slurm", arguments)
    differences = find_differences(sweep.results, undisturbed.results)
    leftovers = find_leftovers(sweep.directory, sweep.results, tmp)
    print(f"points done: {count_done(sweep)} of {count_done(undisturbed)}")
    print(f"differences: {len(differences)}", *differences, sep="\n  ")
    print(f"left over: {len(leftovers)}", *leftovers, sep="\n  ")
    return len(differences) + len(leftovers)


def disturb(sweep: SlurmSweep, folder: Path, arguments: argparse.Namespace) -> None:
    """Run a sweep to its end, on a SLURM of its own, with a monkey for some minutes; print what that did."""
    cluster = Cluster(folder)
    cluster.start()
    try:
        options = ("--retries", "1", "--jobs", str(arguments.jobs), *SAVED_OFTEN)
        monkey = Monkey(sweep, cluster, arguments.seed, *options, *RESOURCES)
        try:
            monkey.torment(60 * arguments.minutes)
            print(f"the monkey stops: {count_done(sweep)} points are done", flush=True)
            reruns = monkey.finish()
        finally:
            monkey.stop()
        wait_until_idle(sweep)
    finally:
        cluster.stop()
    print("| what the monkey did | times |\n|---|---|")
    for name, count in monkey.kills.most_common():
        print(f"| {name} | {count} |")
    print(f"| all | {monkey.kills.total()} |")
    print(f"Snakemake was started {len(monkey.ends)} times, {reruns} of them after the monkey had stopped.", flush=True)


def make(directory: Path, model: Path, seeds: int) -> Sweep:
    """Make the sweep, or, in a folder that stayed, go on with the one that is there."""
    if directory.exists():
        return Sweep(directory, yaml.safe_load((directory / "sweep.yaml").read_text()))
    directory.mkdir()
    variables = {**MODES["variables"], "seed": list(range(seeds))}
    sweep = make_sweep(directory, model, "soak", variables=variables, exclude=MODES["exclude"])
    sweep.edit(**SETTINGS)
    return sweep


def count_done(sweep: Sweep) -> int:
    return len(list(sweep.results.glob("*/manifest.json")))


if __name__ == "__main__":
    main()
