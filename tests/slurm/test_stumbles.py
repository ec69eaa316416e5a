"""A scheduler that stumbles: what it may do, row by row of docs/slurm.md, and that nothing is lost or done twice.

No test allows a retry: an attempt that is spent on an outage is a failure.
"""

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from cluster import Cluster
from lorasweep.planning.history import read_records
from slurm_sweep import TEXT, SlurmSweep, wait_for
from sweep import ROOT

TRAINING_ONLY = {"enabled": False, "baseline": False}


def list_submitted(sweep: SlurmSweep) -> Counter[str]:
    """Return how often SLURM's accounting has a job of each rule and point."""
    command = ["sacct", "--allocations", "--noheader", "--parsable2", "--format=JobName%200,Comment%200"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    comments = [line.split("|")[1] for line in lines if line.startswith(sweep.job_name)]
    return Counter(comment.partition(" ")[0] for comment in comments)


def check_undisturbed(sweep: SlurmSweep) -> None:
    """Check that each job was submitted once, none failed, and all is done."""
    jobs = list_submitted(sweep)
    assert jobs
    assert set(jobs.values()) == {1}, jobs
    assert {record.state for record in read_records(sweep.results / "jobs.csv")} == {"done"}
    assert sweep.plan() == {}


@contextmanager
def outlast(cluster: Cluster, seconds: float, *daemons: str) -> Iterator[None]:
    """Have daemons not answer for some seconds; what is done meanwhile comes at the begin."""
    began = time.monotonic()
    with cluster.silence(*daemons):
        yield
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))


@pytest.mark.alone
def test_a_silent_controller_while_jobs_are_submitted_costs_time_alone(
    make: Callable[..., SlurmSweep], own_cluster: Cluster
) -> None:
    sweep = make("silent", variables={"seed": [0, 1], "mode": ["B1", "B2"]})
    sweep.edit(evaluation={"baseline": False})
    run = sweep.start("--retries", "0")
    sweep.wait_for("a recipe", lambda: list(sweep.results.glob("trainings/*/recipe.yaml")))
    # Longer than the minute that `sbatch` waits for an answer here (MessageTimeout).
    with outlast(own_cluster, 150, "slurmctld"):
        pass
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    assert re.search(r"SLURM has not answered s\w+ since .*, asked \d+ times: ", sweep.said)
    assert "SLURM answers again, after " in sweep.said
    check_undisturbed(sweep)


def stumble(sweep: SlurmSweep, name: str, script: str) -> None:
    """Put a program of this name before SLURM's; `$real` is SLURM's, and `$calls` the number of the call."""
    folder = sweep.directory / "stumbling"
    folder.mkdir(exist_ok=True)
    real = subprocess.run(["which", name], **TEXT).stdout.strip()
    program = folder / name
    program.write_text(f"#!/bin/sh\nreal={real}\necho >> $0.calls; calls=$(wc -l < $0.calls)\n{script}\n")
    program.chmod(0o755)
    sweep.environment["PATH"] = f"{folder}:{os.environ['PATH']}"


def test_a_submission_without_an_answer_is_not_sent_twice(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("unanswered", variables={"seed": [0, 1], "mode": ["B1", "B2"]})
    sweep.edit(evaluation={"baseline": False, "adapters_per_job": 2})
    lost = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    stumble(sweep, "sbatch", f'if [ $((calls % 3)) = 0 ]; then "$real" "$@" > /dev/null; {lost}; fi\nexec "$real" "$@"')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


@pytest.mark.long  # tests/unit says so of the turns
def test_two_jobs_of_one_submission_do_its_work_once(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("twice", variables={"seed": [0, 1]})
    sweep.edit(evaluation={"baseline": False})
    stumble(sweep, "srun", 'exec "$real" "$@"')
    # The plugin knows of one job of each submission: of every other one, that is the second.
    again = '"$real" "$@" > /dev/null'
    stumble(sweep, "sbatch", f'if [ $((calls % 2)) = 0 ]; then {again}; "$real" "$@"; else "$real" "$@"; {again}; fi')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    wait_for("the others", lambda: not sweep.list_jobs("PENDING,RUNNING"))
    assert set(list_submitted(sweep).values()) == {2}
    # Each submission has had its work done by one of its jobs.
    steps = (sweep.directory / "stumbling/srun.calls").read_text()
    assert steps.count("\n") == len(list_submitted(sweep))
    assert sweep.plan() == {}


@pytest.mark.long  # tests/unit says so of the command
def test_a_limit_on_the_number_of_jobs_is_waited_for(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("limit", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    limit = (
        "QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy"
    )
    stumble(sweep, "sbatch", f'[ $calls -gt 2 ] && exec "$real" "$@"; echo "sbatch: error: {limit}" >&2; exit 1')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


def test_a_refusal_for_good_is_told_in_slurms_words(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("refused", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    done = sweep.snakemake("--retries", "0", "--set-resources", "train:slurm_partition=nowhere")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "train: SLURM would refuse its jobs: " in said
    assert "invalid partition specified: nowhere" in said
    assert "has been submitted with" not in said
    assert not list_submitted(sweep)


@pytest.mark.parametrize("first", ["one", pytest.param("other", marks=pytest.mark.long)])
def test_two_sweeps_of_one_clone_do_not_disturb_each_other(make: Callable[..., SlurmSweep], first: str) -> None:
    one = make(f"one_{first}", variables={"seed": [0, 1]})
    about = {"name": f"other_{first}"}
    other = replace(one, config={**one.config, "experiment": about}, file="other.yaml", runs=[])
    for sweep in (one, other):
        sweep.edit(evaluation=TRAINING_ONLY)
    sweep, second = (one, other) if first == "one" else (other, one)
    # Its jobs are queued and do not start before the other sweep has ended.
    later = ["--set-resources", "train:slurm_extra='--begin=now+1hour'"]
    waiting = second.start("--retries", "0", *later)
    jobs = second.wait_for("its jobs", lambda: len(jobs := second.list_jobs("PENDING")) == 2 and jobs)
    try:
        run = sweep.start("--retries", "0")
        assert sweep.wait(run) == 0, sweep.said[-4000:]
        for job in jobs:
            subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)
        assert second.wait(waiting) == 0, second.said[-4000:]
    finally:
        other.end()
    check_undisturbed(one)
    check_undisturbed(other)


@pytest.mark.long  # tests/unit says so of the query
def test_a_job_that_slurm_has_forgotten_is_done(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("forgotten", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    # As after MinJobAge: jobs that have ended are not known any more.
    for name in ("squeue", "sacct"):
        stumble(sweep, name, '"$real" "$@" | grep -vE "COMPLETED|FAILED"; exit 0')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-4000:]
    check_undisturbed(sweep)


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.parametrize("phase", ["waiting", "starting", "running", "ending"])
def test_an_outage_costs_time_alone(make: Callable[..., SlurmSweep], own_cluster: Cluster, phase: str) -> None:
    sweep = make("outage", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    held = ["--set-resources", "train:slurm_extra='--hold'"] if phase in ("waiting", "starting") else []
    run = sweep.start("--retries", "0", *held)
    state = "PENDING" if held else "RUNNING"
    jobs = sweep.wait_for("its jobs", lambda: len(jobs := sweep.list_jobs(state)) == 2 and jobs)
    if phase == "starting":
        for job in jobs:
            subprocess.run(["scontrol", "release", job], check=True)
        sweep.wait_for("their start", sweep.list_jobs)
    if phase in ("running", "ending"):
        sweep.wait_for("a training", lambda: list(sweep.results.glob("trainings/*/state/train/training_log.csv")))
    with outlast(own_cluster, 240, "slurmctld", "slurmdbd"):
        if phase == "ending":
            sweep.hold.unlink()
    sweep.hold.unlink(missing_ok=True)
    if phase == "waiting":
        wait_for("an answer", lambda: sweep.list_jobs("PENDING"))
        for job in jobs:
            subprocess.run(["scontrol", "release", job], check=True)
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


def test_the_reason_why_a_job_waits_is_shown(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("reason", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    run = sweep.start("--retries", "0", "--set-resources", "train:slurm_extra='--hold'")
    [job] = sweep.wait_for("its job", lambda: sweep.list_jobs("PENDING"))
    sweep.wait_for("the reason", lambda: "held: JobHeldUser" in sweep.call("status"))
    subprocess.run(["scontrol", "release", job], check=True)
    assert sweep.wait(run) == 0, sweep.said[-4000:]


@pytest.mark.long
def test_a_controller_that_is_a_job_starts_itself_again_before_its_limit(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("controller", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    # SLURM looks at limits every 30 s, and sends the signal up to a minute early.
    options = ["--parsable", "--export=ALL", "--time=4", "--signal=B:USR1@120", f"--job-name={sweep.job_name}"]
    environment = {**os.environ, **sweep.environment}
    arguments = sweep.list_arguments("--retries", "0")
    del arguments[arguments.index("--profile") : arguments.index("--profile") + 2]
    command = ["sbatch", *options, ROOT / "profiles/slurm/controller.sh", *arguments]
    said = subprocess.run(command, cwd=ROOT, env=environment, **TEXT).stdout
    first = said.strip()
    try:
        training = wait_for("a training", lambda: [j for j, c in sweep.list_jobs().items() if "rule_train" in c])
        wait_for("the end of the first", lambda: first not in sweep.list_jobs("PENDING,RUNNING"))
        second = wait_for("the second", lambda: [j for j, c in sweep.list_jobs().items() if "rule_" not in c])
        assert training[0] in sweep.list_jobs()
        log = ROOT / f"lorasweep-controller-{second[0]}.log"
        wait_for("what it says", lambda: log.exists() and "still runs: the same training" in log.read_text())
        sweep.hold.unlink()
        wait_for("its end", lambda: not sweep.list_jobs("PENDING,RUNNING"))
        assert "1 of 1 points done" in log.read_text()
    finally:
        for log in ROOT.glob("lorasweep-controller-*.log"):
            log.unlink()
    assert sweep.plan() == {}


def test_a_site_without_accounting_that_prints_notices(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("plain_site", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    stumble(sweep, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    stumble(sweep, "sacctmgr", 'echo "You are not running a supported accounting_storage plugin" >&2; exit 1')
    stumble(sweep, "sbatch", 'echo "Welcome to the cluster. Your quota is fine."; exec "$real" "$@"')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)
