"""Dry runs of 10 to 10,000 points, beside a bare workflow with the same rules and files; the plan; the start of a job.

    make install-test && .venv/driver/bin/python benchmarks/plan_scale.py

Figures of dry runs are of a whole process: wall time in seconds, largest memory in MB. `half done` is a dry run when
half of the points have all of their files. `plan` is what the plan takes of the dry run. `job` is the start of a job as
a scheduler starts it: from Snakemake's to that of the job's own command. At last the growth exponent: the slope of log
wall over log points, which is 1 where time is proportional.
"""

import argparse
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
for folder in ("workflow", "tests"):
    sys.path.insert(0, str(ROOT / folder))
from lorasweep.experiment.points import record_points  # noqa: E402
from lorasweep.layout import POINTS  # noqa: E402
from lorasweep.running.run import Places, forecast_run  # noqa: E402
from lorasweep.sweep.sweep import Sweep  # noqa: E402
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
        "eval/metrics.json"]

wildcard_constraints: point="[^/]+", training="[^/]+"

rule all:
    input: "results/results.csv", [f"results/{{p}}/{{f}}" for p in POINTS for f in ("manifest.json", *KEPT)]

rule configure:
    output: recipe="results/trainings/{{training}}/recipe.yaml"
    log: "logs/configure/{{training}}.log"
    params: recipe="{{training}}"
    shell: "true"

rule train:
    input: recipe=ancient("results/trainings/{{training}}/recipe.yaml"), data=ancient("train.jsonl")
    output: adapter=["results/trainings/{{training}}/" + name for name in KEPT[1:4]]
    log: "logs/train/{{training}}.log"
    benchmark: "benchmarks/train/{{training}}.tsv"
    params: adapter="results/trainings/{{training}}/adapter"
    resources: mem_mb=1000, runtime=10
    shell: "true"

rule take:
    input: recipe="results/trainings/{{point}}/recipe.yaml",
           adapter=["results/trainings/{{point}}/" + name for name in KEPT[1:4]]
    output: recipe="results/{{point}}/recipe.yaml", adapter=["results/{{point}}/" + name for name in KEPT[1:4]]
    log: "logs/take/{{point}}.log"
    params: source="results/trainings/{{point}}"
    shell: "true"

rule merge:
    input: adapter=["results/{{point}}/" + name for name in KEPT[1:4]]
    output: model=temp(directory("results/.scratch/merged/{{point}}"))
    log: "logs/merge/{{point}}.log"
    benchmark: "benchmarks/merge/{{point}}.tsv"
    params: adapter="results/{{point}}/adapter"
    resources: mem_mb=1000, runtime=10, merged_models=1
    shell: "true"

rule evaluate:
    input: adapter=["results/{{point}}/" + name for name in KEPT[1:4]], tasks="tasks.py",
           model="results/.scratch/merged/{{point}}"
    output: metrics="results/{{point}}/eval/metrics.json"
    log: "logs/evaluate/{{point}}.log"
    benchmark: "benchmarks/evaluate/{{point}}.tsv"
    params: spec="{{}}", point="results/{{point}}"
    resources: mem_mb=1000, runtime=10, merged_models=1
    shell: "true"

rule cleanup:
    input: kept=["results/{{point}}/" + name for name in KEPT]
    output: manifest="results/{{point}}/manifest.json"
    log: "logs/cleanup/{{point}}.log"
    params: settings="{{}}", point="results/{{point}}"
    shell: "true"

rule collect:
    input: manifests=expand("results/{{point}}/manifest.json", point=POINTS)
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
    print(" points   ours s     MB   bare s     MB  ratio | half done: ours  bare  ratio | plan s  share | job s")
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
                f"{row['ours'] / row['bare']:6.2f} | {row['ours_half']:15.1f} {row['bare_half']:5.1f} "
                f"{row['ours_half'] / row['bare_half']:6.2f} | {row['plan']:6.2f} {row['plan'] / row['ours']:6.3f} | "
                f"{row['job']:5.2f}",
                flush=True,
            )
            if points == max(arguments.points):
                wall, memory = run(folder, *OURS, "--batch", f"all=1/{arguments.batches}")
                print(f"{points:7} {wall:8.1f} {memory:6.0f}  --batch all=1/{arguments.batches}")
    starts = [row["job"] for _, row in rows]
    print(f"start of a job at {rows[-1][0]} points, of that at {rows[0][0]}: {starts[-1] / starts[0]:.2f}")
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
    found: dict[str, float] = {}
    ways = {"ours": OURS, "bare": ("--snakefile", "bare.smk")}
    for way, arguments in ways.items():
        found[way], found[f"{way}_mb"] = run(folder, *arguments)
    sweep = load(folder)
    found["plan"] = time_plan(sweep, folder)
    with chdir(folder):
        record_points(sweep.points, sweep.results / POINTS)
    training = next(iter(sweep.trainings))
    found["job"] = start_job(folder, training)
    finish(folder, sweep, list(sweep.points)[::2])
    for way, arguments in ways.items():
        found[f"{way}_half"], _ = run(folder, *arguments)
    shutil.rmtree(folder / "results")
    return found


def load(folder: Path) -> Sweep:
    with chdir(folder):
        sweep = Sweep.load(yaml.safe_load((folder / "my.yaml").read_text()), "my.yaml")
        assert sweep.trainings
        return sweep


def time_plan(sweep: Sweep, folder: Path) -> float:
    """Return the seconds of making the plan that a dry run prints, of points that are known already."""
    wanted = {(rule, name) for name in sweep.points for rule in ("configure", "train", "take", "merge", "evaluate")}
    wanted |= {("cleanup", name) for name in sweep.points}
    began = time.monotonic()
    with chdir(folder):
        forecast = forecast_run(sweep, wanted, Places(None, 50, None))
        assert forecast
        forecast.describe_shortly()
        forecast.explain_shortage()
    return time.monotonic() - began


def finish(folder: Path, sweep: Sweep, points: Sequence[str]) -> None:
    """Leave all files of some points, for both workflows, each after those that it is made of."""
    adapter = [f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "lorasweep.json")]
    now = time.time()
    for point in points:
        places = ((f"results/scale/{point}", f"results/scale/trainings/{sweep.points[point].training}"),)
        for own, training in (*places, (f"results/{point}", f"results/trainings/{point}")):
            made = [f"{training}/{name}" for name in ("recipe.yaml", *adapter)]
            made += [f"{own}/{name}" for name in ("recipe.yaml", *adapter)]
            made += [f"{own}/eval/letters.eval", f"{own}/eval/metrics.json", f"{own}/manifest.json"]
            for age, name in enumerate(reversed(made)):
                file = folder / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("{}")
                os.utime(file, (now - age, now - age))


def start_job(folder: Path, training: str) -> float:
    """Return the seconds from the start of a training's job to that of its command, which opens the log."""
    log = folder / f"results/scale/logs/train/{training}.log"
    recipe = folder / f"results/scale/trainings/{training}/recipe.yaml"
    for file in (log, recipe):
        file.parent.mkdir(parents=True, exist_ok=True)
    recipe.touch()
    command = [sys.executable, "-m", "snakemake", "--directory", str(folder), "--cores", "4", *OURS]
    command += ["--target-jobs", f"train:training={training}", "--allowed-rules", "train", "--mode", "remote"]
    command += ["--force", "--force-use-threads", "--nolock", "--notemp", "--no-hooks", "--ignore-incomplete"]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        job = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said, start_new_session=True)
        while not log.exists():
            time.sleep(0.002)
            if job.poll() is not None and not log.exists():
                said.seek(0)
                sys.exit(said.read()[-3000:])
        seconds = time.monotonic() - began
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return seconds


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
