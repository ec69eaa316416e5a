"""What the workflow costs on SLURM: a sweep against the same commands as chains of `sbatch --dependency`.

    make install-test && python3 tests/slurm/cluster.py install && .venv/driver/bin/python benchmarks/slurm_overhead.py

Both on the same cluster (started for it, four nodes on this machine), in turn. The commands are the sweep's own, with a
trainer that learns nothing and a tiny model. Each takes a given time (`held_command.py`) and next to no CPU, so that a
small machine carries four nodes. Printed are the ratios of the median makespans, and where a job's seconds go, as means
over all jobs, since the times of `sacct` are whole seconds.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests"), str(ROOT / "tests/slurm")]
from cluster import Cluster  # noqa: E402
from sweep import Sweep, make_sweep, run_stage  # noqa: E402

HELD = Path(__file__).with_name("held_command.py")
CPUS = 2
MEMORY_MB = 4000
MODES = ("A", "B1", "B2")
RULES = ("train", "export", "merge", "evaluate", "evaluate_adapters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 60], help="what each job takes")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clone", type=Path, default=ROOT, help="another clone, to compare with")
    asked = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # as for those who have not heard of it
    with tempfile.TemporaryDirectory(prefix="lorasweep-overhead-", dir="/tmp") as name:
        folder = Path(name)
        run_stage("train", "tiny_model.py", "--family", "llama3", "--output", folder / "model")
        cluster = Cluster(folder / "slurm")
        cluster.start()
        try:
            for points in asked.points:
                for seconds in asked.seconds:
                    for mode in asked.modes:
                        compare(Bench(folder, asked.clone.resolve(), points, seconds, mode), asked.repeats)
        finally:
            cluster.stop()


@dataclass
class Run:
    """One side's run."""

    began: float
    makespan: float
    jobs: list[dict[str, float]]
    """Times of each job: submitted, start, end by `sacct`; begun, ended of the command; snakemake of its start."""
    queries: int = 0

    @property
    def first(self) -> float:
        return min(job["submitted"] for job in self.jobs) - self.began

    @property
    def last(self) -> float:
        return max(job["end"] for job in self.jobs) - self.began


@dataclass
class Bench:
    """A setting, and the clone whose environments are stood in for."""

    folder: Path
    clone: Path
    points: int
    seconds: float
    mode: str
    count: int = 0
    files: Path = field(init=False)

    def __post_init__(self) -> None:
        """Make a folder that looks like the clone, but for the Python of the environment `eval`."""
        self.files = Path(tempfile.mkdtemp(dir=self.folder))
        for name in ("Snakefile", "workflow", "scripts", "envs", "profiles", "slurm"):
            (self.files / name).symlink_to(self.clone / name)
        python = self.files / ".venv/eval/bin/python"
        python.parent.mkdir(parents=True)
        real = self.clone / ".venv/eval/bin/python"
        words = [sys.executable, "-S", HELD, "call", self.files, self.seconds, real]
        python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        python.chmod(0o755)
        (self.files / ".venv/eval/installed").touch()
        for stage in ("driver", "train"):
            (self.files / ".venv" / stage).symlink_to(self.clone / ".venv" / stage)

    @contextmanager
    def serve(self) -> Iterator[None]:
        path = os.pathsep.join([str(self.clone / "workflow"), str(ROOT / "tests/slurm")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [self.clone / ".venv/eval/bin/python", HELD, "serve", self.files]
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            assert server.stdout.readline() == "ready\n"
            yield
        finally:
            server.kill()
            server.wait()
            (self.files / "socket").unlink()

    def make(self) -> Sweep:
        self.count += 1
        directory = self.files / f"sweep-{self.count}"
        directory.mkdir()
        variables = {"seed": list(range(self.points))}
        sweep = make_sweep(directory, self.folder / "model", "overhead", trainer="quick_trainer", variables=variables)
        evaluation = {
            "A": {"model_format": "hf"},
            "B1": {},
            "B2": {"merge_adapters": False, "adapters_per_job": 1},
        }[self.mode]
        sweep.edit(controls={"epochs": 2}, evaluation={"baseline": False, "max_tokens": 2, **evaluation})
        return sweep

    def snakemake(self, sweep: Sweep, *arguments: str | Path) -> str:
        where = ["--snakefile", self.files / "Snakefile", "--directory", sweep.directory]
        command = [sys.executable, "-m", "snakemake", *where, "--configfile", sweep.directory / sweep.file, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests/slurm")}
        # Snakemake reads profiles/default where it is called.
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.files, env=environment)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def run_workflow(self) -> Run:
        sweep = self.make()
        prefix = f"overhead-{os.getpid()}-{self.count}"
        rules = [rule for rule in RULES if rule != "export" or self.mode == "A"]
        profile = ["--profile", self.files / "slurm", "--slurm-no-account", "--slurm-jobname-prefix", prefix]
        sizes = ["--set-resources", *(f"{rule}:mem_mb={MEMORY_MB}" for rule in rules)]
        sizes += ["--set-threads", *(f"{rule}={CPUS}" for rule in rules)]
        counter = self.files / "counting"
        counter.mkdir(exist_ok=True)
        calls = counter / "squeue.calls"
        calls.unlink(missing_ok=True)
        real = subprocess.run(["which", "squeue"], capture_output=True, text=True, check=True).stdout.strip()
        (counter / "squeue").write_text(f'#!/bin/sh\necho >> {calls}\nexec {real} "$@"\n')
        (counter / "squeue").chmod(0o755)
        path = os.environ["PATH"]
        os.environ["PATH"] = f"{counter}:{path}"
        start, began = datetime.now(), time.time()
        try:
            self.snakemake(sweep, *profile, *sizes)
        finally:
            os.environ["PATH"] = path
        makespan = time.time() - began
        return Run(began, makespan, self.read_jobs(start, prefix), len(calls.read_text().splitlines()))

    def run_chains(self) -> Run:
        """Submit by hand what a dry run prints, a chain for each point."""
        sweep = self.make()
        self.snakemake(sweep, "--cores", "1", "configure_all")
        printed = self.snakemake(sweep, "--cores", "1", "--dry-run", "--printshellcmds")
        commands = dict(read_commands(printed))
        os.chdir(sweep.directory)
        start, began = datetime.now(), time.time()
        for recipe in sorted(sweep.results.glob("trainings/*/recipe.yaml")):
            training = recipe.parent.relative_to(sweep.directory)
            label = training.name.rpartition("-")[0]
            point = training.parents[1] / label
            run = [self.files / "scripts/run", "driver", "-m", "lorasweep", "job"]
            take = [*run, "take", "--source", training / "adapter", "--recipe", training / "recipe.yaml"]
            take += ["--state", training / "state", "--point", point]
            folders = [point / "eval", sweep.results / ".batches", sweep.results / ".scratch/merged"]
            for folder in (*folders, *(sweep.results / "logs" / rule for rule in RULES)):
                folder.mkdir(parents=True, exist_ok=True)
            jobs = [[commands["train", label], shlex.join(map(str, take))]]
            made = [commands[rule, label] for rule in ("export", "merge") if (rule, label) in commands]
            jobs += [[command] for command in made]
            evaluation = [
                commands[rule, label] for rule in ("evaluate", "evaluate_adapters") if (rule, label) in commands
            ]
            if self.mode == "B1":
                evaluation.append(f"rm -r {shlex.quote(str(sweep.results / '.scratch/merged' / label))}")
            jobs.append(evaluation)
            job = ""
            for parts in jobs:
                job = submit(parts, *([f"--dependency=afterok:{job}"] if job else []))
        while subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout.strip():
            time.sleep(0.5)
        makespan = time.time() - began
        os.chdir(ROOT)
        found = len(list(sweep.results.glob("*/eval/metrics.json")))
        found += len(list(sweep.results.glob("*/state/eval/done/metrics.json")))
        assert found == self.points, found
        return Run(began, makespan, self.read_jobs(start, "by-hand"))

    def read_jobs(self, since: datetime, name: str) -> list[dict[str, float]]:
        """Return the times of the jobs of a name that were submitted since then."""
        time.sleep(6)  # accounting hears of a job some seconds later
        lines = [json.loads(line) for line in (self.files / "times.jsonl").read_text().splitlines()]
        (self.files / "times.jsonl").unlink()
        own = {line["job"]: line for line in lines}
        command = ["sacct", "-X", "--noheader", "--parsable2", "--format=JobIDRaw,Submit,Start,End,JobName,Comment"]
        command.append(f"--starttime={since.isoformat(timespec='seconds')}")
        jobs = []
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
            job, *times, said, comment = line.split("|")
            if job in own and said.startswith(name):
                moments = [datetime.fromisoformat(moment).timestamp() for moment in times]
                label = re.sub(r"-\w+$", "", comment.partition(" ")[0].rpartition("_wildcards_")[2])
                known = dict(zip(("submitted", "start", "end"), moments, strict=True))
                jobs.append({**own[job], **known, "label": label})
        return jobs


def read_commands(printed: str) -> Iterator[tuple[tuple[str, str], str]]:
    """Return the commands that a dry run prints, by rule and label of the point."""
    for line in printed.splitlines():
        command = line.strip().removeprefix("Shell command: ").removeprefix("exec ")
        if not (found := re.search(r"scripts/run \w+ -m lorasweep job (\w+) ", command)):
            continue
        rule = "export" if "--verify" in command else found[1]
        if label := re.search(r"\bseed=\d+", command):
            yield (rule, label[0]), command


def submit(commands: list[str], *options: str) -> str:
    sbatch = ["sbatch", "--parsable", "--job-name=by-hand", f"--cpus-per-task={CPUS}", f"--mem={MEMORY_MB}"]
    call = [*sbatch, "--output=/dev/null", *options, "--wrap", "set -e\n" + "\n".join(commands)]
    environment = {**os.environ, "LORASWEEP_DRIVER": sys.executable, "PYTHONPATH": str(ROOT / "tests/slurm")}
    return subprocess.run(call, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def compare(bench: Bench, repeats: int) -> None:
    print(f"\n{bench.points} points, mode {bench.mode}, jobs of {bench.seconds:g} s", flush=True)
    sides: dict[str, list[Run]] = {"by hand": [], "workflow": []}
    with bench.serve():
        for _ in range(repeats):
            sides["by hand"].append(bench.run_chains())
            sides["workflow"].append(bench.run_workflow())
    for side, runs in sides.items():
        spans = " ".join(f"{run.makespan:.0f}" for run in runs)
        print(f"  {side}: {spans} s; a job: {describe([job for run in runs for job in run.jobs])}")
    hand, workflow = ([run.makespan for run in runs] for runs in sides.values())
    print(f"  ratio of medians: {statistics.median(workflow) / statistics.median(hand):.2f}")
    jobs_alone = [statistics.median(run.last - run.first for run in runs) for runs in sides.values()]
    print(f"  from the first submission to the last job's end: {jobs_alone[1] / jobs_alone[0]:.2f}")
    before = statistics.median(run.first for run in sides["workflow"])
    after = statistics.median(run.makespan - run.last for run in sides["workflow"])
    print(f"  the workflow's plan before: {before:.0f} s; its tables and report after: {after:.0f} s")
    print(f"  between a job's end and the submission of its point's next: {measure_gaps(sides['workflow'])}")
    every = [run.makespan / run.queries for run in sides["workflow"]]
    print(f"  squeue: every {statistics.median(every):.0f} s", flush=True)


def describe(jobs: list[dict[str, float]]) -> str:
    """Say where the seconds of a job go, as means."""
    names = ("submitted", "start", "snakemake", "begun", "ended", "end")
    words = ("in the queue", "node and step start", "Snakemake", "command", "end")
    known = [name for name in names if all(name in job for job in jobs)]
    spans = []
    for first, second in pairwise(known):
        word = words[names.index(second) - 1] if second != "begun" or "snakemake" in known else "start"
        spans.append(f"{word} {statistics.mean(job[second] - job[first] for job in jobs):.1f}")
    return ", ".join(spans)


def measure_gaps(runs: list[Run]) -> str:
    """Say how long a point waits between its jobs: until the end is noticed, and the next job is submitted."""
    gaps = []
    for run in runs:
        chains: dict[object, list[dict[str, float]]] = {}
        for job in sorted(run.jobs, key=lambda job: job["submitted"]):
            chains.setdefault(job["label"], []).append(job)
        for chain in chains.values():
            gaps += [after["submitted"] - before["ended"] for before, after in pairwise(chain)]
    return f"{statistics.mean(gaps):.1f} s" if gaps else "no such job"


if __name__ == "__main__":
    main()
