"""A scheduler that stumbles: what it may do, as in docs/how-to/slurm.md, and that nothing is lost or done twice.

No test allows a retry: an attempt that is spent on an outage is a failure.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest

from cluster import Cluster
from slurm_sweep import ALIVE, TEXT, TRAINING_ONLY, SlurmSweep, check_undisturbed, list_submitted, stumble, wait_for
from sweep import ROOT


@contextmanager
def outlast(cluster: Cluster, seconds: float, *daemons: str) -> Iterator[None]:
    """Have daemons not answer for some seconds; what is done meanwhile comes at the begin."""
    began = time.monotonic()
    with cluster.silence(*daemons):
        yield
        time.sleep(max(0.0, seconds - (time.monotonic() - began)))


@pytest.mark.alone
@pytest.mark.long  # tests/unit says so of each command without an answer
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


def test_a_submission_without_an_answer_is_not_sent_twice(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("unanswered", variables={"seed": [0, 1, 2]})
    sweep.edit(evaluation=TRAINING_ONLY)
    lost = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
    stumble(sweep, "sbatch", f'if [ $((calls % 3)) = 0 ]; then "$real" "$@" > /dev/null; {lost}; fi\nexec "$real" "$@"')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    assert (sweep.directory / "stumbling/sbatch.calls").read_text().count("\n") >= 3
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
    wait_for("the others", lambda: not sweep.list_jobs(ALIVE))
    assert set(list_submitted(sweep).values()) == {2}
    # Each submission has had its work done by one of its jobs.
    steps = (sweep.directory / "stumbling/srun.calls").read_text()
    assert steps.count("\n") == len(list_submitted(sweep))
    assert sweep.plan() == {}


@pytest.mark.long  # tests/unit says so of the names of jobs, by which a sweep finds its own
@pytest.mark.parametrize("first", ["one", "other"])
def test_two_sweeps_of_one_clone_do_not_disturb_each_other(make: Callable[..., SlurmSweep], first: str) -> None:
    one = make(f"one_{first}", variables={"seed": [0, 1]})
    one.edit(evaluation=TRAINING_ONLY)
    other = make(f"other_{first}", beside=one)
    sweep, second = (one, other) if first == "one" else (other, one)
    # Its jobs are queued and do not start before the other sweep has ended.
    later = ["--set-resources", "train:slurm_extra='--begin=now+1hour'"]
    waiting = second.start("--retries", "0", *later)
    jobs = second.wait_for("its jobs", lambda: len(jobs := second.list_jobs("PENDING")) == 2 and jobs)
    run = sweep.start("--retries", "0")
    assert sweep.wait(run) == 0, sweep.said[-4000:]
    for job in jobs:
        subprocess.run(["scontrol", "update", f"jobid={job}", "StartTime=now"], check=True)
    assert second.wait(waiting) == 0, second.said[-4000:]
    check_undisturbed(one)
    check_undisturbed(other)


@pytest.mark.alone
@pytest.mark.long
def test_an_outage_of_ten_minutes_costs_time_alone(make: Callable[..., SlurmSweep], own_cluster: Cluster) -> None:
    phases = ("submission", "waiting", "starting", "running", "ending", "interrupted")
    first = make("outage", variables={"seed": [0, 1]})
    first.edit(evaluation=TRAINING_ONLY)
    sweeps = {phase: make(f"outage_{phase}", beside=first) for phase in phases}
    ahead = {phase: sweep for phase, sweep in sweeps.items() if phase != "submission"}
    runs, jobs = {}, {}
    for phase, sweep in ahead.items():
        sweep.hold.touch()
        held = ["--set-resources", "train:slurm_extra='--hold'"] if phase in ("waiting", "starting") else []
        runs[phase] = sweep.start("--retries", "0", *held)
    for phase, sweep in ahead.items():
        if phase in ("waiting", "starting"):
            jobs[phase] = sweep.wait_for("jobs", lambda s=sweep: len(found := s.list_jobs("PENDING")) == 2 and found)
        else:
            sweep.wait_for("trainings", lambda s=sweep: len([*s.results.glob("trainings/*/state/train/*.csv")]) == 2)
    submitting = sweeps["submission"]
    runs["submission"] = submitting.start("--retries", "0")
    submitting.wait_for("a recipe", lambda: list(submitting.results.glob("trainings/*/recipe.yaml")))
    release(jobs["starting"])
    sweeps["starting"].wait_for("their start", sweeps["starting"].list_jobs)
    with outlast(own_cluster, 600, "slurmctld", "slurmdbd"):
        sweeps["ending"].hold.unlink()
        runs["interrupted"].send_signal(signal.SIGINT)
    for phase in ("starting", "running"):
        sweeps[phase].hold.unlink()
    sweeps["waiting"].hold.unlink()
    wait_for("an answer", lambda: sweeps["waiting"].list_jobs("PENDING"))
    release(jobs["waiting"])
    interrupted = sweeps.pop("interrupted")
    assert interrupted.wait(runs.pop("interrupted")) != 0
    assert not interrupted.list_jobs(ALIVE), interrupted.said[-6000:]
    for phase, sweep in sweeps.items():
        assert sweep.wait(runs[phase]) == 0, (phase, sweep.said[-6000:])
        check_undisturbed(sweep)
    interrupted.hold.unlink()
    assert interrupted.wait(interrupted.start("--retries", "0")) == 0, interrupted.said[-6000:]


def release(jobs: Iterable[str]) -> None:
    """Have jobs start that were submitted with --hold."""
    for job in jobs:
        subprocess.run(["scontrol", "release", job], check=True)


@pytest.mark.long  # tests/unit says so of the status
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
    # At a limit on the number of jobs, SLURM takes the next one later.
    refuse = 'touch $0.refused; echo "sbatch: error: AssocMaxSubmitJobLimit" >&2; exit 1'
    stumble(sweep, "sbatch", f'case "$*" in *GOES_ON*) [ -e $0.refused ] || {{ {refuse}; }};; esac; exec "$real" "$@"')
    # SLURM looks at limits every 30 s, and sends the signal up to a minute early.
    options = ["--parsable", "--export=ALL", "--time=4", f"--job-name={sweep.job_name}"]
    # As a variable, for the jobs that follow too: five minutes before a limit of four is at once.
    environment = {**os.environ, **sweep.environment, "SBATCH_SIGNAL": "B:USR1@120"}
    arguments = sweep.list_arguments("--retries", "0")
    del arguments[arguments.index("--profile") : arguments.index("--profile") + 2]
    command = ["sbatch", *options, ROOT / "profiles/slurm/controller.sh", *arguments]
    said = subprocess.run(command, cwd=ROOT, env=environment, **TEXT).stdout
    first = said.strip()
    try:
        training = wait_for("a training", lambda: [j for j, c in sweep.list_jobs().items() if "rule_train" in c])
        wait_for("the end of the first", lambda: first not in sweep.list_jobs(ALIVE))
        second = wait_for("the second", lambda: [j for j, c in sweep.list_jobs().items() if "rule_" not in c])
        assert training[0] in sweep.list_jobs()
        log = ROOT / f"lorasweep-controller-{second[0]}.log"
        wait_for("what it says", lambda: log.exists() and "still runs: the same training" in log.read_text())
        sweep.hold.unlink()
        wait_for("its end", lambda: not sweep.list_jobs(ALIVE))
        # On a slow machine it hands over in its turn.
        said = [log.read_text() for log in ROOT.glob("lorasweep-controller-*.log")]
        assert any("1 of 1 points done" in text for text in said), said
        assert (sweep.directory / "stumbling/sbatch.refused").exists()
    finally:
        for log in ROOT.glob("lorasweep-controller-*.log"):
            log.unlink()
    assert sweep.plan() == {}


@pytest.mark.long
def test_a_site_without_accounting_that_prints_notices(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("plain_site", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    stumble(sweep, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    stumble(sweep, "sacctmgr", 'echo "You are not running a supported accounting_storage plugin" >&2; exit 1')
    stumble(sweep, "sbatch", 'echo "Welcome to the cluster. Your quota is fine."; exec "$real" "$@"')
    assert sweep.wait(sweep.start("--retries", "0")) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)
