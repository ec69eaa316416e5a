"""A sweep whose jobs go to SLURM."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lorasweep.planning.history import read_records
from sweep import ROOT, Sweep

SITE_PARTITION = os.environ.get("LORASWEEP_SLURM_PARTITION")

TEXT: Any = {"capture_output": True, "text": True, "check": True}

ALIVE = "PENDING,CONFIGURING,RUNNING"
"""States of jobs that have not ended. While SLURM prepares a node, `squeue --states=RUNNING` leaves its job out."""

TRAINING_ONLY = {"enabled": False, "baseline": False}

SECONDS_TO_END = 1200
"""For what ends by itself: a machine that does much else, as in `make test`, is slow."""


@dataclass
class SlurmSweep(Sweep):
    """A sweep whose jobs go to SLURM, with waits that suit jobs of seconds."""

    program: tuple[str | Path, ...] = (Path(__file__).with_name("attentive_snakemake.py"),)
    runs: list[subprocess.Popen[str]] = field(default_factory=list)
    """Those that were started and went on."""
    login_node: str = ""
    """The name of the machine that Snakemake is to run on; it reaches the same SLURM and the same files."""

    @property
    def hold(self) -> Path:
        """While this file is there, what was told to wait for it does."""
        return self.directory / f"{self.config['experiment']['name']}.hold"

    def list_arguments(self, *arguments: str | Path) -> list[str]:
        site = ["--default-resources", f"slurm_partition={SITE_PARTITION}"] if SITE_PARTITION else []
        quick = ["--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10", "--slurm-no-account"]
        # The nodes share the cores of one machine.
        rules = ("train", "train_part", "export", "merge", "evaluate", "evaluate_adapters")
        threads = ["--set-threads", *(f"{rule}=1" for rule in rules)]
        retries = [] if "--retries" in arguments else ["--retries", "0"]
        name = ["--slurm-jobname-prefix", self.job_name]
        own = super().list_arguments("--profile", ROOT / "slurm", *arguments)
        return [*own, *quick, *threads, *retries, *name, *site]

    def command(self, *arguments: str | Path) -> list[str]:
        node = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.login_node] if self.login_node else []
        return [*node, *super().command(*arguments)]

    def plan(self, *arguments: str | Path) -> dict[str, int]:
        """The number of jobs that a dry run says would run, by rule; it looks at no job, so no more than Snakemake."""
        return Sweep.plan(replace(self, program=Sweep.program), *arguments)

    @property
    def job_name(self) -> str:
        return f"{self.config['experiment']['name']}-{os.getpid()}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start Snakemake and go on; its words go to a file."""
        with self.said_file.open("w") as said:
            run = subprocess.Popen(
                self.command(*arguments),
                cwd=ROOT,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **self.environment},
                # A shell has what it starts in the background ignore Ctrl-C, and so would this.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.runs.append(run)
        return run

    def wait(self, run: subprocess.Popen[str]) -> int:
        """Wait for a run's end, and return its exit status; one that does not end tells where it stands."""
        try:
            return run.wait(timeout=SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGUSR1)
            time.sleep(2)
            jobs, processes = self.list_jobs("all"), subprocess.run(["ps", "-eo", "pid,ppid,stat,wchan,args"], **TEXT)
            own = "\n".join(line for line in processes.stdout.splitlines() if str(self.directory) in line)
            raise AssertionError(f"the run goes on; {jobs=}; processes: {own}; it said: {self.said[-8000:]}") from None

    def wait_for(self, what: str, condition: Callable[[], Any]) -> Any:
        """Wait until a condition gives something, which it does while a run goes on, and return it."""

        def find() -> Any:
            ended = all(run.poll() is not None for run in self.runs)
            found = condition()
            if ended and not found:
                raise AssertionError(f"the run has ended without {what}; it said: {self.said[-8000:]}")
            return found

        return wait_for(what, find)

    def end(self) -> None:
        """End what still runs of it, as after a test that failed."""
        for run in self.runs:
            if run.poll() is None:
                run.kill()
                run.wait()
        if jobs := [*self.list_jobs(ALIVE)]:
            subprocess.run(["scancel", *jobs], check=False, capture_output=True)

    @property
    def said_file(self) -> Path:
        return self.directory / f"{self.config['experiment']['name']}.said"

    @property
    def said(self) -> str:
        return self.said_file.read_text()

    def list_jobs(self, state: str = "RUNNING") -> dict[str, str]:
        """This sweep's jobs in SLURM: id and comment, less the mark of the submission."""
        command = ["squeue", "--me", "--noheader", f"--states={state}", "--format=%i|%k|%j"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        jobs = [line.strip().split("|") for line in lines]
        return {job: comment.partition(" ")[0] for job, comment, name in jobs if name.startswith(self.job_name)}


def wait_for(what: str, condition: Callable[[], Any], seconds: float = SECONDS_TO_END) -> Any:
    """Wait until a condition gives something, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


def get_node(job: str) -> str:
    """Return where a job runs."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%N"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def end_time_now(job: str) -> None:
    """Have SLURM end a job as over its time limit, which it does at its next look; it has one every 30 s."""
    command = ["scontrol", "update", f"jobid={job}", "endtime=now"]
    # For some seconds after a job's start it refuses, until its accounting has heard of it.
    wait_for("another time limit", lambda: subprocess.run(command, capture_output=True).returncode == 0)


def read_accounting(sweep: SlurmSweep, *fields: str, steps: bool = False) -> list[list[str]]:
    """Return fields of SLURM's accounting for each job of a sweep, or for the step that does a job's work."""
    command = ["sacct", "--noheader", "--parsable2", f"--format={','.join(('JobIDRaw', 'JobName', *fields))}"]

    def read() -> list[list[str]]:
        rows = [line.split("|") for line in subprocess.run(command, **TEXT).stdout.splitlines()]
        jobs = {job for job, name, *_ in rows if name.startswith(sweep.job_name)}
        asked = {f"{job}.0" for job in jobs} if steps else jobs
        return [found for job, _, *found in rows if job in asked]

    found: list[list[str]] = wait_for("accounting", read)
    return found


def list_submitted(sweep: SlurmSweep) -> Counter[str]:
    """Return how often SLURM's accounting has a job of each rule and point."""
    return Counter(comment.partition(" ")[0] for [comment] in read_accounting(sweep, "Comment"))


def check_undisturbed(sweep: SlurmSweep) -> None:
    """Check that each job was submitted once, none failed, and all is done."""
    jobs = list_submitted(sweep)
    assert jobs
    assert set(jobs.values()) == {1}, jobs
    assert {record.state for record in read_records(sweep.results / "jobs.csv")} == {"done"}
    assert sweep.plan() == {}


def stumble(sweep: SlurmSweep, name: str, script: str) -> None:
    """Put a program of this name before SLURM's; `$real` is SLURM's, and `$calls` the number of the call."""
    folder = sweep.directory / "stumbling"
    folder.mkdir(exist_ok=True)
    real = subprocess.run(["which", name], **TEXT).stdout.strip()
    program = folder / name
    program.write_text(f"#!/bin/sh\nreal={real}\necho >> $0.calls; calls=$(wc -l < $0.calls)\n{script}\n")
    program.chmod(0o755)
    sweep.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
