"""How long mode B1 holds a GPU on SLURM: merge and evaluation as jobs of their own, and as one job.

    make demo && python3 tests/slurm/cluster.py install && .venv/driver/bin/python benchmarks/gpu_hold.py

Both on one cluster (started for it, four nodes on this machine, two with a pretended GPU) in one go: random adapters of
the demo's model, evaluated on the demo's task. As one job, Snakemake groups `merge` and `evaluate` of a point, so that
the GPU is held during both. Printed are the seconds for which a job held a GPU, the makespan, and the most merged
models that existed at a time.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tests", "tests/slurm")]
from cluster import Cluster  # noqa: E402
from sampling import sample_merged_models  # noqa: E402
from sweep import RUN  # noqa: E402

APART, TOGETHER = "two jobs", "one job"
ON_A_GPU = ("slurm_partition=gpu", "gpu=1")
GPUS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--samples", type=int, default=8, help="samples of the demo's task")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorasweep-gpus-") as name:
        folder = Path(name)
        make = [RUN, "eval", ROOT / "benchmarks/direct.py", "--make", folder / "adapters", ROOT / "demo/model"]
        subprocess.run([*make, str(arguments.points)], check=True, stdout=subprocess.DEVNULL)
        cluster = Cluster(folder / "slurm")
        cluster.start()
        try:
            found = {way: run(folder, way, arguments.points, arguments.samples) for way in (TOGETHER, APART)}
        finally:
            cluster.stop()
    print(f"{'merge and evaluation':20} {'GPU s per point':>16} {'makespan s':>11} {'peak of merged models':>22}")
    for way, (held, makespan, peak) in found.items():
        print(f"{way:20} {held:16.1f} {makespan:11.0f} {peak:22}")
    print(
        f"ratio: {found[APART][0] / found[TOGETHER][0]:.2f} of the GPU seconds, "
        f"{found[APART][1] / found[TOGETHER][1]:.2f} of the makespan"
    )


def run(folder: Path, way: str, points: int, samples: int) -> tuple[float, float, int]:
    """Evaluate all adapters; return the median seconds on a GPU, the makespan, and the most merged models at a time."""
    directory = folder / way.replace(" ", "-")
    shutil.copytree(ROOT / "demo", directory / "demo", ignore=shutil.ignore_patterns("downloads", "model.partial"))
    experiment = {
        "experiment": {"name": "gpus"},
        "model": {"path": "demo/model", "dtype": "fp32", "device": "cpu"},
        "runs": [{"name": f"p{index}", "adapter": str(folder / f"adapters/point{index}")} for index in range(points)],
        "evaluation": {
            "baseline": False,
            "max_merged_models": GPUS + 1,
            "max_tokens": 8,
            "tasks": [{"task": "demo/capitalisation.py@capitalisation", "limit": samples}],
        },
        "plan": {"count": False},
    }
    (directory / "gpus.yaml").write_text(yaml.safe_dump(experiment))
    gpu_rules = ("evaluate",) if way == APART else ("merge", "evaluate")
    requests = [f"{rule}:{request}" for rule in gpu_rules for request in ON_A_GPU]
    requests += [f"{rule}:mem_mb=2000" for rule in ("merge", "evaluate")]
    groups = ["--groups", "merge=point", "evaluate=point"] if way == TOGETHER else []
    prefix = f"gpus-{os.getpid()}"
    start, began = datetime.now(), time.monotonic()
    with sample_merged_models(directory / "results/gpus/.scratch/merged") as merged:
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", directory]
        command += ["--configfile", directory / "gpus.yaml", "--profile", ROOT / "slurm", "--slurm-no-account"]
        command += ["--slurm-jobname-prefix", prefix, "--slurm-init-seconds-before-status-checks", "1"]
        command += ["--set-threads", "merge=1", "evaluate=1", *groups, "--set-resources", *requests]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    makespan = time.monotonic() - began
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return statistics.median(read_seconds_on_gpus(start)), makespan, merged.peak


def read_seconds_on_gpus(since: datetime) -> list[float]:
    """Return the seconds of each job that held a GPU."""
    time.sleep(6)  # accounting hears of a job some seconds later
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=Submit,ElapsedRaw,AllocTRES"]
    command.append(f"--starttime={since.isoformat(timespec='seconds')}")
    rows = [line.split("|") for line in subprocess.check_output(command, text=True).splitlines()]
    return [
        float(seconds)
        for submitted, seconds, resources in rows
        if "gres/gpu" in resources and datetime.fromisoformat(submitted) >= since.replace(microsecond=0)
    ]


if __name__ == "__main__":
    main()
