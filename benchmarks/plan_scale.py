"""Dry runs of 10 to 10,000 points, beside a bare workflow with the same rules and files; and the plan by itself.

    make install-test && .venv/driver/bin/python benchmarks/plan_scale.py

Every figure is of a whole process (`--dry-run`): wall time in seconds, largest memory in MB. `parse` is what every job
pays too: a dry run of one recipe. `plan` is what the plan takes of the dry run. At last the growth
exponent: the slope of log wall over log points, which is 1 where time is proportional.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
for folder in ("workflow", "tests"):
    sys.path.insert(0, str(ROOT / folder))
from lorasweep.checkpoints.checkpoint import read_checkpoint  # noqa: E402
from lorasweep.experiment.loading import load_experiment  # noqa: E402
from lorasweep.experiment.points import get_points  # noqa: E402
from lorasweep.experiment.sections import Data  # noqa: E402
from lorasweep.planning.forecast import make_forecast  # noqa: E402
from plain_checkpoint import write_checkpoint  # noqa: E402

EXPERIMENT = """
experiment: {{name: scale}}
variables: {{seed: [{seeds}]}}
model: {{path: model, dtype: fp32, device: cpu}}
data: {{train: train.jsonl}}
plan: {{parallel_jobs: 50}}
evaluation: {{tasks: [tasks.py@letters], merge_adapters: true}}
"""

TASK = "from inspect_ai import Task, task\n\n@task\ndef letters():\n    return Task()\n"

BARE = """
POINTS = [f"seed={{i}}" for i in range({points})]
KEPT = ["recipe.yaml", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/lorasweep.json",
        "eval/letters.eval", "eval/metrics.json"]

rule all:
    input: "results/results.csv", [f"results/{{p}}/{{f}}" for p in POINTS for f in ("manifest.json", *KEPT)]

rule configure:
    output: recipe="results/{{point}}/recipe.yaml"
    log: "logs/configure/{{point}}.log"
    params: recipe="{{point}}"
    shell: "true"

rule train:
    input: recipe="results/{{point}}/recipe.yaml", data=ancient("train.jsonl"), script="tasks.py"
    output: adapter=["results/{{point}}/" + name for name in KEPT[1:4]]
    log: "logs/train/{{point}}.log"
    benchmark: "benchmarks/train/{{point}}.tsv"
    params: adapter="results/{{point}}/adapter"
    resources: mem_mb=1000, runtime=10
    shell: "true"

rule evaluate_merged:
    input: adapter=["results/{{point}}/" + name for name in KEPT[1:4]], tasks="tasks.py", script="tasks.py"
    output: logs="results/{{point}}/eval/letters.eval", metrics="results/{{point}}/eval/metrics.json",
            merged=temp(directory("results/{{point}}/merged"))
    log: "logs/evaluate/{{point}}.log"
    benchmark: "benchmarks/evaluate/{{point}}.tsv"
    params: spec="{{}}", point="results/{{point}}"
    resources: mem_mb=1000, runtime=10, merged_models=1
    shell: "true"

rule cleanup:
    input: kept=["results/{{point}}/" + name for name in KEPT], script="tasks.py"
    output: manifest="results/{{point}}/manifest.json"
    log: "logs/cleanup/{{point}}.log"
    params: settings="{{}}", point="results/{{point}}"
    shell: "true"

rule collect:
    input: manifests=expand("results/{{point}}/manifest.json", point=POINTS), script="tasks.py"
    output: table="results/results.csv"
    shell: "true"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[10, 100, 1000, 5000, 10_000])
    parser.add_argument("--repeats", type=int, default=3, help="of sizes up to 1,000; larger ones run once")
    parser.add_argument(
        "--batches", type=int, default=10, help="plan the largest size as the first of so many batches too"
    )
    arguments = parser.parse_args()
    print(" points   ours s     MB   bare s     MB  ratio  parse s  plan s  share")
    rows = []
    for points in arguments.points:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, points)
            repeats = arguments.repeats if points <= 1000 else 1
            found = [measure(folder) for _ in range(repeats)]
            row = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append((points, row))
            print(
                f"{points:7} {row['ours']:8.1f} {row['ours_mb']:6.0f} {row['bare']:8.1f} {row['bare_mb']:6.0f} "
                f"{row['ours'] / row['bare']:6.2f} {row['parse']:8.2f} {row['plan']:7.2f} "
                f"{row['plan'] / row['ours']:6.3f}",
                flush=True,
            )
            if points == max(arguments.points):
                wall, memory = run(folder, *OURS, "--batch", f"all=1/{arguments.batches}")
                print(f"{points:7} {wall:8.1f} {memory:6.0f}  --batch all=1/{arguments.batches}")
    large = [(points, row) for points, row in rows if points >= 100]
    for way in ("ours", "bare"):
        if len(large) > 1:
            slope = statistics.linear_regression(
                [math.log(points) for points, _ in large], [math.log(row[way]) for _, row in large]
            ).slope
            print(f"growth exponent of {way}, {large[0][0]} to {large[-1][0]} points: {slope:.2f}")


OURS = ("--snakefile", str(ROOT / "Snakefile"), "--configfile", "my.yaml")


def prepare(folder: Path, points: int) -> None:
    write_checkpoint(folder / "model")
    (folder / "train.jsonl").write_text('{"input": "a", "output": "b"}\n' * 100)
    (folder / "tasks.py").write_text(TASK)
    (folder / "my.yaml").write_text(EXPERIMENT.format(seeds=", ".join(map(str, range(points)))))
    (folder / "bare.smk").write_text(BARE.format(points=points))


def measure(folder: Path) -> dict[str, float]:
    ours, ours_mb = run(folder, *OURS)
    bare, bare_mb = run(folder, "--snakefile", "bare.smk")
    parse, _ = run(folder, "results/scale/seed=0/recipe.yaml", *OURS)
    return {
        "ours": ours,
        "ours_mb": ours_mb,
        "bare": bare,
        "bare_mb": bare_mb,
        "parse": parse,
        "plan": time_plan(folder),
    }


def time_plan(folder: Path) -> float:
    """Return the seconds of making the plan that a dry run prints, of points that are known already."""
    experiment = load_experiment(yaml.safe_load((folder / "my.yaml").read_text()), "my.yaml")
    points = get_points(experiment, "my.yaml", folder / "points.json")
    wanted = {(rule, name) for name in points for rule in ("configure", "train", "evaluate_merged", "cleanup")}
    base = read_checkpoint(folder / "model")
    experiment = experiment.model_copy(update={"data": Data(train=str(folder / "train.jsonl"))})
    began = time.monotonic()
    forecast = make_forecast(experiment, points, base, folder / "results/scale", wanted, {}, "", 50, 100, [], [], {})
    forecast.describe_shortly()
    forecast.explain_shortage()
    return time.monotonic() - began


def run(folder: Path, *arguments: str) -> tuple[float, float]:
    """Return wall time in seconds and largest memory in MB."""
    command = [sys.executable, "-m", "snakemake", "--directory", str(folder), "--cores", "2", "--dry-run", *arguments]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*command, "--quiet", "rules"], cwd=folder, stdout=log, stderr=log)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            log.seek(0)
            sys.exit(log.read()[-3000:])
    return time.monotonic() - began, used.ru_maxrss / 1024


if __name__ == "__main__":
    main()
