"""What the workflow costs on SLURM: a sweep of 8 points against the same commands as chains of `sbatch --dependency`.

    make install-test && python3 tests/slurm/cluster.py install && .venv/driver/bin/python benchmarks/slurm_overhead.py

Both on the same cluster (started for it, four nodes on this machine) in one go, the chains first and last: each point
trains, merges and evaluates (mode B1) a tiny model, some ten seconds of work a job. Printed are the makespans, their
ratio, and where the difference goes, by `sacct`.
"""

import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests"), str(ROOT / "tests/slurm")]
from cluster import Cluster  # noqa: E402
from lorasweep.checkpoints.checkpoint import read_checkpoint  # noqa: E402
from lorasweep.evaluation.spec import make_evaluation_spec  # noqa: E402
from lorasweep.experiment.loading import load_experiment  # noqa: E402
from lorasweep.experiment.tasks import get_tasks  # noqa: E402
from sweep import RUN, Sweep, make_sweep, run_stage  # noqa: E402

POINTS = 8
CPUS = "--cpus-per-task=2"
MEMORY = "--mem=4000"


JOB = ("-m", "lorasweep", "job")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="lorasweep-overhead-") as folder:
        cluster = Cluster(Path(folder, "slurm"))
        cluster.start()
        try:
            compare(Path(folder))
        finally:
            cluster.stop()


def compare(folder: Path) -> None:
    model = folder / "model"
    run_stage("train", "tiny_model.py", "--family", "llama3", "--output", model)
    chains = [run_chains(make(folder / "chains-1", model))]
    sweep = make(folder / "sweep", model)
    start = time.monotonic()
    workflow, name = run_workflow(sweep)
    makespan = time.monotonic() - start
    chains.append(run_chains(make(folder / "chains-2", model)))
    by_hand = statistics.mean(seconds for seconds, _ in chains)
    print(f"makespan of {POINTS} points, train and evaluate, in seconds:")
    print(f"  sbatch --dependency chains, before and after: {chains[0][0]:.0f} and {chains[1][0]:.0f}")
    print(f"  snakemake --profile slurm:                    {makespan:.0f}")
    print(f"ratio: {makespan / by_hand:.2f}")
    print("where it goes (medians of a job, in seconds):")
    hand_jobs = statistics.median(job for _, jobs in chains for job in jobs)
    print(f"  in the job: {statistics.median(workflow):.1f} instead of {hand_jobs:.1f} (Snakemake starts inside it)")
    print(f"  between a point's training and its evaluation: {name:.1f} (how often the states are looked at)")


def make(directory: Path, model: Path) -> Sweep:
    directory.mkdir()
    sweep = make_sweep(directory, model, "overhead", variables={"seed": list(range(POINTS))})
    sweep.edit(controls={"epochs": 2}, evaluation={"baseline": False, "max_tokens": 2})
    return sweep


def run_workflow(sweep: Sweep) -> tuple[list[float], float]:
    """Return how long each job ran, and the median wait between a point's training and its evaluation."""
    resources = ["--set-resources", *(f"{rule}:mem_mb=4000" for rule in ("train", "merge", "evaluate"))]
    threads = ["--set-threads", "train=2", "evaluate=2"]
    prefix = f"overhead-{os.getpid()}"
    profile = ["--profile", ROOT / "slurm", "--slurm-no-account", "--slurm-jobname-prefix", prefix]
    start = datetime.now()
    sweep.run(*profile, *resources, *threads)
    jobs = [job for job in read_accounts(start) if job["name"].startswith(prefix)]
    ends = {job["comment"].rpartition("_")[2]: job["end"] for job in jobs if "rule_train" in job["comment"]}
    waits = [
        job["start"] - ends[job["comment"].rpartition("_")[2]] for job in jobs if "rule_evaluate" in job["comment"]
    ]
    return [job["end"] - job["start"] for job in jobs], statistics.median(waits)


def run_chains(sweep: Sweep) -> tuple[float, list[float]]:
    """Submit the commands of every point by hand; return the makespan and how long each job ran."""
    sweep.run("configure_all")
    experiment = load_experiment(sweep.config, "sweep.yaml")
    os.chdir(sweep.directory)
    tasks = get_tasks(experiment.evaluation.tasks)
    files = [entry.file for entry in tasks if entry.file]
    fingerprint = read_checkpoint(Path("model")).fingerprint
    spec = make_evaluation_spec(experiment, tasks, files, "B1", fingerprint).model_dump_json()
    start, began = datetime.now(), time.monotonic()
    for recipe in sorted(sweep.results.glob("trainings/*/recipe.yaml")):
        training = recipe.parent.relative_to(sweep.directory)
        point = training.parents[1] / training.name.rpartition("-")[0]
        recipe, adapter, merged = training / "recipe.yaml", training / "adapter", point / "merged"
        train = [RUN, "train", *JOB, "train", "--recipe", recipe, "--adapter", adapter]
        take = [RUN, "driver", *JOB, "take", "--source", adapter, "--recipe", recipe]
        take += ["--state", training / "state", "--point", point]
        merge = [RUN, "eval", *JOB, "merge", "--base", "model", "--adapter", point / "adapter", "--output", merged]
        merge += ["--dtype", "fp32", "--temporary"]
        evaluate = [RUN, "eval", *JOB, "evaluate", "--spec", spec, "--point", point]
        evaluate += ["--model", merged, "--probes", point.parent / ".probes"]
        job = submit([train, take])
        job = submit([merge], f"--dependency=afterok:{job}")
        submit([evaluate, ["rm", "-r", merged]], f"--dependency=afterok:{job}")
    while subprocess.run(["squeue", "--noheader"], capture_output=True, text=True).stdout.strip():
        time.sleep(0.5)
    makespan = time.monotonic() - began
    os.chdir(ROOT)
    assert len(list(sweep.results.glob("*/eval/metrics.json"))) == POINTS
    return makespan, [job["end"] - job["start"] for job in read_accounts(start)]


def submit(commands: list[list[object]], *options: str) -> str:
    sbatch = ["sbatch", "--parsable", CPUS, MEMORY, "--output=/dev/null", *options]
    wrapped = " && ".join(shlex.join(map(str, command)) for command in commands)
    return subprocess.run([*sbatch, "--wrap", wrapped], capture_output=True, text=True, check=True).stdout.strip()


def read_accounts(since: datetime) -> list[dict[str, object]]:
    """Jobs that were submitted since then, with start and end in seconds."""
    time.sleep(6)  # accounting hears of a job some seconds later
    command = ["sacct", "-X", "--noheader", "--parsable2", "--format=Submit,Start,End,JobName,Comment"]
    command.append(f"--starttime={since.isoformat(timespec='seconds')}")
    jobs = []
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        submitted, start, end, name, comment = line.split("|")
        if datetime.fromisoformat(submitted) >= since.replace(microsecond=0):
            seconds = {key: datetime.fromisoformat(v).timestamp() for key, v in (("start", start), ("end", end))}
            jobs.append({**seconds, "name": name, "comment": comment.partition(" ")[0]})
    return jobs


if __name__ == "__main__":
    main()
