"""A monkey that kills what a sweep on SLURM is made of, and the comparison of what comes out with an undisturbed sweep.

A seed decides what it does and when; whom it hits depends on what runs at that moment.
"""

import csv
import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from cluster import APART_NODES as NODES
from cluster import Cluster
from lorasweep.trainers.training_log import read_log
from slurm_sweep import ALIVE, SECONDS_TO_END, SlurmSweep, wait_for

PARTITION = "apart_preemptible"
SETTINGS = {
    # Random numbers are drawn in each step.
    "controls": {"epochs": 20, "lora_dropout": 0.1},
    "evaluation": {"max_merged_models": 3, "adapters_per_job": 4},
}
RESOURCES = ("--default-resources", f"slurm_partition={PARTITION}", "mem_mb=4000", "runtime=60")
SAVED_OFTEN = ("--set-resources", "train:save_minutes='0.02'")
ONE_THREAD = (
    "--set-threads",
    *(f"{rule}=1" for rule in ("train", "export", "merge", "evaluate", "evaluate_adapters")),
)
SECONDS_BETWEEN = (2.0, 14.0)
SECONDS_DOWN = (5.0, 60.0)
MOST_NODES_DOWN = 2
MOST_RERUNS = 4


class Monkey:
    """Runs a sweep by one command, again and again, and kills parts of it meanwhile.

    Args:
        sweep: is not running yet.
        cluster: that its jobs go to.
        seed: of its choices.
        arguments: of Snakemake, the same ones each time.
    """

    def __init__(self, sweep: SlurmSweep, cluster: Cluster, seed: int, *arguments: str) -> None:
        self.kills: Counter[str] = Counter()
        self.ends: list[tuple[int, str]] = []
        """Of each Snakemake: its exit status, and how it summed up what was done."""
        self._sweep, self._cluster, self._arguments = sweep, cluster, arguments
        self._random = random.Random(seed)
        self._down: dict[str, float] = {}
        self._began = time.monotonic()
        self._run = self._start()
        self._tricks: dict[str, tuple[int, Callable[[], str]]] = {
            "scancel of a job": (4, self._cancel),
            "kill -9 of a job's program": (4, lambda: self._signal_job(signal.SIGKILL, whole=False)),
            "kill -9 of all of a job": (2, lambda: self._signal_job(signal.SIGKILL, whole=True)),
            "SIGTERM to a job's program": (2, lambda: self._signal_job(signal.SIGTERM, whole=False)),
            "scontrol requeue of a job": (2, self._requeue),
            "preemption of a node": (3, self._preempt),
            "death of a node": (3, self._kill_node),
            "a node without network": (1, self._unplug_node),
            "kill -9 of snakemake": (3, lambda: self._end_controller(signal.SIGKILL)),
            "Ctrl-C to snakemake": (1, lambda: self._end_controller(signal.SIGINT)),
        }

    def torment(self, seconds: float) -> None:
        """Do what a monkey does; a Snakemake that ended is started again by the same command."""
        deadline = time.monotonic() + seconds
        names = list(self._tricks)
        weights = [self._tricks[name][0] for name in names]
        while time.monotonic() < deadline:
            due = time.monotonic() + self._random.uniform(*SECONDS_BETWEEN)
            [name] = self._random.choices(names, weights)
            while time.monotonic() < min(due, deadline):
                self._look_after()
                time.sleep(0.2)
            if target := self._tricks[name][1]():
                self.kills[name] += 1
                self._say(f"{name}: {target}")

    def finish(self) -> int:
        """Stop, mend the nodes, and give the same command until all is done; return how often it was given.

        Raises:
            AssertionError: the sweep is not done after several times.
        """
        for node in list(self._down):
            self._revive(node)
        count = 0
        while self._run.wait() != 0:
            self._note_end()
            assert count < MOST_RERUNS, f"not done after {count} reruns:\n{self.ends[-1][1]}"
            count += 1
            self._run = self._start()
        self._note_end()
        return count

    def stop(self) -> None:
        """End what was started."""
        if self._run.poll() is None:
            self._run.kill()
            self._run.wait()
        for node in list(self._down):
            self._revive(node)

    def _look_after(self) -> None:
        for node in [node for node, until in self._down.items() if time.monotonic() > until]:
            self._revive(node)
        if self._run.poll() is not None:
            self._note_end()
            self._run = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return self._sweep.start(*self._arguments)

    def _note_end(self) -> None:
        lines = [line for line in self._sweep.said.splitlines() if " points done, " in line]
        self.ends.append((self._run.returncode, lines[-1] if lines else ""))
        self._say(f"snakemake ended with {self._run.returncode} {lines[-1] if lines else ''}")
        said = self._sweep.said_file
        said.rename(said.with_name(f"said-{len(self.ends)}.log"))

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.0f} s  {text}", flush=True)

    def _choose_job(self, states: str = "RUNNING") -> str:
        jobs = sorted(self._sweep.list_jobs(states), key=int)
        return self._random.choice(jobs) if jobs else ""

    def _describe(self, job: str) -> str:
        comment = self._sweep.list_jobs(ALIVE).get(job, "")
        return f"{job} {comment.removeprefix('rule_').replace('_wildcards_', ' of ')}"

    def _cancel(self) -> str:
        job = self._choose_job(ALIVE)
        return self._order("scancel", job) if job else ""

    def _requeue(self) -> str:
        job = self._choose_job()
        return self._order("scontrol", "requeue", job) if job else ""

    def _order(self, *command: str) -> str:
        said = self._describe(command[-1])
        done = subprocess.run(command, capture_output=True, text=True)
        return said if done.returncode == 0 else ""  # it has ended meanwhile

    def _signal_job(self, number: int, whole: bool) -> str:
        job = self._choose_job()
        if not job:
            return ""
        said = self._describe(job)
        hit = [process for process, _ in _find_processes(job)] if whole else list(filter(None, [find_program(job)]))
        for process in hit:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        return said if hit else ""

    def _preempt(self) -> str:
        node = self._random.choice([node for node in NODES if node not in self._down] or list(NODES))
        options = ["--partition=apart", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--time=10"]
        name = f"--job-name={self._sweep.job_name}-important"
        done = subprocess.run(["sbatch", *options, name, "--wrap", "sleep 3"], capture_output=True, text=True)
        return node if done.returncode == 0 else ""

    def _kill_node(self) -> str:
        return self._take_node(keep_jobs=False)

    def _unplug_node(self) -> str:
        return self._take_node(keep_jobs=True)

    def _take_node(self, keep_jobs: bool) -> str:
        if len(self._down) >= MOST_NODES_DOWN:
            return ""
        node = self._random.choice([node for node in NODES if node not in self._down])
        seconds = self._random.uniform(*SECONDS_DOWN)
        self._down[node] = time.monotonic() + seconds
        self._cluster.kill_node(node, keep_jobs=keep_jobs)
        return f"{node}, for {seconds:.0f} s"

    def _revive(self, node: str) -> None:
        del self._down[node]
        self._cluster.revive_node(node)

    def _end_controller(self, number: int) -> str:
        if self._run.poll() is not None:
            return ""
        self._run.send_signal(number)
        self._run.wait(timeout=SECONDS_TO_END)
        return f"process {self._run.pid}"


def find_program(job: str) -> psutil.Process | None:
    """Return the process of a SLURM job, whose node is this machine, that does what a rule runs."""
    is_ours = " -m lorasweep job "
    lines = {process: line for process, line in _find_processes(job) if is_ours in line and "snakemake" not in line}
    pythons = [process for process, line in lines.items() if "python" in line.partition(" ")[0]]
    # The oldest: a child that is about to become another program has its parent's command line.
    return min(pythons, key=lambda process: process.create_time(), default=None)


def _find_processes(job: str) -> Iterator[tuple[psutil.Process, str]]:
    """The processes of a job with their command lines."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == job:
                yield process, " ".join(process.cmdline())
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue


def find_differences(results: Path, others: Path) -> list[str]:
    """Return what of a sweep's results is not, bit for bit, as in another's; times and what has them in it aside."""
    points = sorted(file.parent.name for file in others.glob("*/manifest.json"))
    found = sorted(file.parent.name for file in results.glob("*/manifest.json"))
    if points != found:
        return [f"other points: {sorted({*points} ^ {*found})}"]
    files = ["results.csv", "replicates.csv", "answer.json", "samples.parquet"]
    files += [f"{point}/{name}" for point in points for name in _POINT_FILES if (others / point / name).exists()]
    return [file for file in files if _read(results / file) != _read(others / file)]


_POINT_FILES = (
    "recipe.yaml",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
    "adapter/training_log.csv",
    "adapter/lorasweep.json",
    "hf_model/lorasweep.json",
    "eval/metrics.json",
    "manifest.json",
)

_TIMES = (
    "seconds",
    "bytes",
    "finished",
    "files",
    "git_revision",
    "log",
    "base_model_name_or_path",
    "peak_memory_bytes",
    "usage",
    "busy",
)


def _read(file: Path) -> Any:
    """A file's content less what differs between any two runs."""
    if not file.exists():
        return None
    if file.name == "training_log.csv":
        return [(row.step, row.epoch, row.loss, row.lr, row.tokens, row.validation_loss) for row in read_log(file)]
    if file.suffix == ".csv":
        with file.open(newline="") as stream:
            return [
                {key: value for key, value in row.items() if not key.endswith(_TIMES)} for row in csv.DictReader(stream)
            ]
    if file.suffix == ".json":
        return _strip(json.loads(file.read_text()))
    return file.read_bytes()


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(part) for key, part in value.items() if not key.endswith(_TIMES)}
    return [_strip(part) for part in value] if isinstance(value, list) else value


def find_leftovers(directory: Path, results: Path, tmp: Path) -> list[str]:
    """Return what should be gone when a sweep is done: merged models, what was half made, locks, states."""
    patterns = (".scratch", "*/.*.partial", "*/state", "*/.*.tmp", ".batches", ".*.tmp", ".controller.json")
    left = [path for pattern in patterns for path in results.glob(pattern)]
    left += [
        *directory.glob(".snakemake/locks/*"),
        *directory.glob(".snakemake/incomplete/*"),
        *tmp.glob("lorasweep-*"),
    ]
    return [str(path) for path in left]


def wait_until_idle(sweep: SlurmSweep) -> None:
    """Wait until no job of a sweep is left."""
    wait_for("the jobs to be gone", lambda: not sweep.list_jobs(ALIVE))
