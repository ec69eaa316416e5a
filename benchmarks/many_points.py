"""A sweep of 1,000 points on SLURM: what the controller costs a job, what SLURM is asked, and ten interruptions.

    make install-test && python3 tests/slurm/cluster.py install && .venv/driver/bin/python benchmarks/many_points.py

The trainings learn nothing and nothing is evaluated, so that SLURM and the controller are all there is. Two sweeps of
the same points run on a SLURM of this machine that is started for them: one undisturbed, and one that is interrupted
ten times (Ctrl-C and kill -9 in turns) and goes on by the same command. SLURM takes at most `--most-submitted` jobs of
the user at a time (`MaxSubmitJobs`), which is less than the run has in flight.

Printed are, for each tenth of the undisturbed sweep, the controller's processor time for a job and its memory; the
calls of SLURM's commands and the least seconds between two queries; the most jobs that were submitted at a time; and
what differs between both sweeps. Exit status: 0 if nothing does, and no limit was broken.

`--dry` starts no SLURM: it makes the sweep, and prints how many jobs a dry run plans, with its time and memory.
"""

import argparse
import getpass
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests"), str(ROOT / "tests/slurm")]
from cluster import Cluster  # noqa: E402
from lorasweep.util.formats import format_bytes  # noqa: E402
from monkey import find_differences, find_leftovers, wait_until_idle  # noqa: E402
from slurm_sweep import ALIVE, TRAINING_ONLY, SlurmSweep, stumble  # noqa: E402
from sweep import Sweep, make_sweep, run_stage  # noqa: E402

QUERIES = ("squeue", "sacct", "sinfo", "scontrol")
COMMANDS = ("sbatch", "scancel", *QUERIES)
SECONDS_BETWEEN_SAMPLES = 2.0
SECONDS_BETWEEN_QUERIES = 5.0
"""The least between two calls of `squeue`."""

MOST_ATTEMPTS = 30
OPTIONS = ("--retries", "1", "--default-resources", "mem_mb=500", "runtime=30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=50, help="that the run has in flight")
    parser.add_argument("--most-submitted", type=int, default=30, help="that SLURM takes of the user")
    parser.add_argument("--dry", action="store_true", help="start no SLURM, and plan only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="many-") as folder:
        sys.exit(plan(Path(folder), arguments.points) if arguments.dry else compare(Path(folder), arguments))


def make(directory: Path, model: Path, points: int) -> Sweep:
    directory.mkdir()
    variables = {"seed": list(range(points))}
    sweep = make_sweep(directory, model, "many", variables=variables, trainer="quick_trainer")
    # One base for both sweeps: its path is in what they leave.
    sweep.edit(evaluation=TRAINING_ONLY, controls={"epochs": 1}, model={"path": str(model)})
    sweep.environment["PYTHONPATH"] = str(ROOT / "tests/slurm")
    return sweep


def make_model(folder: Path) -> Path:
    run_stage("train", "tiny_model.py", "--family", "llama3", "--output", folder / "model")
    return folder / "model"


def plan(folder: Path, points: int) -> int:
    """Print what a dry run plans; return 0 if it is a training for each point."""
    sweep = make(folder / "dry", make_model(folder), points)
    sweep.program = (*sweep.program, "--nocolor")  # as a process of its own
    began = time.monotonic()
    jobs = sweep.plan()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{points} points: {jobs}; {time.monotonic() - began:.1f} s, at most {format_bytes(peak)}")
    return int(jobs.get("train") != points)


def compare(folder: Path, arguments: argparse.Namespace) -> int:
    """Run both sweeps; return how much was found to be wrong."""
    model = make_model(folder)
    cluster = Cluster(folder / "slurm")
    cluster.start()
    try:
        limit = f"MaxSubmitJobs={arguments.most_submitted}"
        account = ["sacctmgr", "--immediate", "modify", "user", getpass.getuser(), "set", limit]
        subprocess.run(account, check=True, capture_output=True)
        plain, disturbed = (
            SlurmSweep(made.directory, made.config, dict(made.environment))
            for made in (make(folder / name, model, arguments.points) for name in ("plain", "disturbed"))
        )
        # As a user's, whose Snakemake asks SLURM more seldom than that of tests.
        plain.program = (*Sweep.program, "--nocolor")
        wrong = run_undisturbed(plain, arguments)
        wrong += run_interrupted(disturbed, arguments)
    finally:
        cluster.stop()
    differences = find_differences(disturbed.results, plain.results)
    leftovers = find_leftovers(disturbed.directory, disturbed.results, folder / "none")
    print(f"differences: {len(differences)}", *differences[:20], sep="\n  ")
    print(f"left over: {len(leftovers)}", *leftovers[:20], sep="\n  ")
    return wrong + len(differences) + len(leftovers)


def list_options(arguments: argparse.Namespace) -> list[str]:
    return [*OPTIONS, "--jobs", str(arguments.jobs)]


@dataclass(frozen=True)
class Sample:
    """The controller at a moment, its children but for SLURM's commands aside."""

    seconds: float
    done: int
    cpu_seconds: float
    memory: int
    submitted: int


def run_undisturbed(sweep: SlurmSweep, arguments: argparse.Namespace) -> int:
    """Run a sweep while its controller is sampled, and print what it cost; return how many limits were broken."""
    for name in COMMANDS:
        stumble(sweep, name, 'date +%s.%N >> $0.times; exec $real "$@"')
    began, samples = time.monotonic(), list[Sample]()
    run = sweep.start(*list_options(arguments))
    process = psutil.Process(run.pid)
    try:
        while run.poll() is None:
            if sample := look(sweep, process, began):
                samples.append(sample)
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    finally:
        sweep.end()
    print(f"undisturbed: {time.monotonic() - began:.0f} s, exit status {run.returncode}")
    print_tenths(samples, arguments.points)
    calls = {name: read_times(sweep, name) for name in COMMANDS}
    print("| command | calls | for a point |\n|---|---|---|")
    for name, times in calls.items():
        print(f"| {name} | {len(times)} | {len(times) / arguments.points:.2f} |")
    gaps = [after - before for before, after in zip(calls["squeue"], calls["squeue"][1:], strict=False)]
    # `look` asks SLURM by itself, past the counting programs.
    most = max((sample.submitted for sample in samples), default=0)
    print(f"least seconds between two calls of squeue: {min(gaps, default=0):.1f}")
    print(f"most jobs submitted at a time: {most}")
    is_slow = not gaps or min(gaps) >= SECONDS_BETWEEN_QUERIES
    return (run.returncode != 0) + (not is_slow) + (most > arguments.most_submitted)


def look(sweep: SlurmSweep, process: psutil.Process, began: float) -> Sample | None:
    """Return a sample; `None` if the run has ended meanwhile."""
    try:
        with process.oneshot():
            times, memory = process.cpu_times(), process.memory_info().rss
    except psutil.NoSuchProcess:
        return None
    spent = times.user + times.system + times.children_user + times.children_system
    submitted = len(sweep.list_jobs(ALIVE))
    return Sample(time.monotonic() - began, count_done(sweep), spent, memory, submitted)


def print_tenths(samples: list[Sample], points: int) -> None:
    """Print the cost of each tenth of the points: it should not grow."""
    print("| points done | seconds | processor seconds for a point | memory |\n|---|---|---|---|")
    before = Sample(0, 0, 0, 0, 0)
    for tenth in range(1, 11):
        after = next((sample for sample in samples if sample.done >= points * tenth / 10), samples[-1])
        if after.done > before.done:
            each = (after.cpu_seconds - before.cpu_seconds) / (after.done - before.done)
            print(f"| {after.done} | {after.seconds:.0f} | {each:.2f} | {format_bytes(after.memory)} |")
            before = after


def run_interrupted(sweep: SlurmSweep, arguments: argparse.Namespace) -> int:
    """Run a sweep that is interrupted at even distances; return 1 if it did not end well, else 0."""
    marks = [
        arguments.points * (number + 1) // (arguments.interruptions + 1) for number in range(arguments.interruptions)
    ]
    ends: Counter[str] = Counter()
    for _ in range(arguments.interruptions + MOST_ATTEMPTS):
        run = sweep.start(*list_options(arguments))
        while run.poll() is None and not (marks and count_done(sweep) >= marks[0]):
            time.sleep(0.2)
        if run.poll() is None:
            number = signal.SIGINT if len(marks) % 2 else signal.SIGKILL
            marks.pop(0)
            run.send_signal(number)
            ends[number.name] += 1
        if sweep.wait(run) == 0:
            break
    wait_until_idle(sweep)
    print(f"interrupted: {dict(ends)}; the last exit status is {run.returncode}; {count_done(sweep)} points done")
    return int(run.returncode != 0 or bool(marks))


def read_times(sweep: SlurmSweep, name: str) -> list[float]:
    """Return when the controller and its jobs called a command of SLURM, in order."""
    file = sweep.directory / "stumbling" / f"{name}.times"
    return sorted(map(float, file.read_text().split())) if file.exists() else []


def count_done(sweep: Sweep) -> int:
    return sum(os.path.exists(entry.path + "/manifest.json") for entry in scan(sweep.results))


def scan(folder: Path) -> list[os.DirEntry[str]]:
    return list(os.scandir(folder)) if folder.is_dir() else []


if __name__ == "__main__":
    main()
