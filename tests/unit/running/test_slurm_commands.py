"""SLURM's commands as a run calls them: SLURM is a stub here, which fails as told; tests/slurm has a real one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasweep.util import slurm_commands
from lorasweep.util.slurm import COMMANDS

TIMED_OUT = "slurm_load_jobs error: Socket timed out on send/recv operation"
COMMENT = "rule_train_wildcards_lr=1e-3"

Start = Callable[[str, str], "subprocess.Popen[str]"]


FAST = """
import runpy, sys, time
sleep, monotonic = time.sleep, time.monotonic
time.sleep, time.monotonic = lambda seconds: sleep(seconds / 20), lambda: 20 * monotonic()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a program with a clock that goes 20 times as fast."""


class Slurm:
    """A folder of stub commands, and of what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.queue = folder / "queue"
        self.queue.touch()
        self.records = folder / "records"
        self.python = folder / "python"
        (folder / "fast.py").write_text(FAST)
        self.python.write_text(f'#!/bin/sh\nshift 2  # -E -S\nexec {sys.executable} {folder}/fast.py "$@"\n')
        self.python.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{COMMANDS}:{folder}:{os.environ['PATH']}",
            "LORASWEEP_DRIVER": str(self.python),
            "LORASWEEP_SLURM": str(self.records),
        }

    def add(self, name: str, script: str) -> None:
        file = self.folder / name
        file.write_text(f'#!/bin/sh\necho x >> "$0.calls"\ncalls=$(wc -l < "$0.calls")\nqueue={self.queue}\n{script}\n')
        file.chmod(0o755)

    def count(self, name: str) -> int:
        calls = self.folder / f"{name}.calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True)

    def submit(self, *, name: str = "run", comment: str = COMMENT) -> subprocess.CompletedProcess[str]:
        return self.call("sbatch", "--parsable", "--job-name", name, "--comment", comment, "--wrap=true")


SUBMITS = """
while [ $# -gt 0 ]; do case "$1" in --comment) comment=$2;; --wrap=*) wrap=$1;; esac; shift; done
id=$((100 + $(wc -l < $queue))); echo "$id|$comment" >> $queue; echo "$wrap" > $queue.wrap
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    made = Slurm(tmp_path)
    made.add("squeue", "cat $queue")
    return made


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_partitions: Socket timed out on send/recv operation",
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Slurm backup controller in standby mode",
        "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
        "accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "sacct: error: Problem talking to the database: Connection refused",
        "sacctmgr: error: _open_persist_conn: failed to open persistent connection to host:db:6819: Connection refused",
    ],
)
def test_what_passes_is_waited_for(said: str) -> None:
    assert slurm_commands.find_outage(said)


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
        "sbatch: error: invalid partition specified: nowhere",
        "sbatch: error: Batch job submission failed: Requested node configuration is not available",
        "sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: Batch job submission failed: Job violates "
        "accounting/QOS policy (job submit limit, user's size and/or time limits)",
        "slurm_load_jobs error: Invalid job id specified",
    ],
)
def test_what_never_passes_is_not(said: str) -> None:
    assert not slurm_commands.find_outage(said)


def test_a_command_is_asked_again_until_it_answers(slurm: Slurm) -> None:
    slurm.add("sinfo", f'[ $calls -gt 1 ] && echo "main*" && exit 0; echo "{TIMED_OUT}" >&2; exit 1')
    done = slurm.call("sinfo", "-o", "%P")
    assert (done.returncode, done.stdout) == (0, "main*\n")
    assert slurm.count("sinfo") == 2
    assert not list(slurm.records.glob("outages/*.json"))


def test_while_it_waits_a_file_tells_of_it(slurm: Slurm) -> None:
    slurm.add("sinfo", f'while [ ! -e $queue.go ]; do echo "{TIMED_OUT}" >&2; exit 1; done')
    waiting = subprocess.Popen(["sinfo"], env=slurm.environment)
    while not (files := list(slurm.records.glob("outages/[!.]*.json"))):
        time.sleep(0.05)
    record = json.loads(files[0].read_text())
    assert (record["command"], record["tries"], record["reason"]) == ("sinfo", 1, TIMED_OUT)
    (slurm.folder / "queue.go").touch()
    assert waiting.wait() == 0


def test_patience_ends_and_other_failures_are_passed_on(slurm: Slurm) -> None:
    slurm.add("sinfo", f'echo "{TIMED_OUT}" >&2; exit 3')
    done = slurm.call("sinfo", LORASWEEP_PATIENCE="0")
    assert (done.returncode, done.stderr.strip()) == (3, TIMED_OUT)
    slurm.add("sacct", 'echo "sacct: error: Invalid field requested" >&2; exit 4')
    done = slurm.call("sacct")
    assert (done.returncode, slurm.count("sacct")) == (4, 1)
    assert slurm.call(sys.executable, slurm_commands.__file__, "nowhere").returncode == 127


class TestSubmission:
    def test_an_unanswered_one_that_was_queued_is_taken_over(self, slurm: Slurm) -> None:
        slurm.add("sbatch", f'{SUBMITS}\necho "{TIMED_OUT}" >&2; exit 1')
        done = slurm.submit()
        # The plugin takes words such as "submission failed" for a failure, whatever the exit status.
        assert (done.returncode, done.stdout, done.stderr) == (0, "100\n", "")
        assert slurm.count("sbatch") == 1
        assert (slurm.records / "jobs/100.json").is_file()

    def test_one_that_was_not_queued_is_sent_again(self, slurm: Slurm) -> None:
        slurm.queue.write_text(f"7|{COMMENT} 0123456789ab\n")  # of another submission
        slurm.add("sbatch", f'[ $calls -gt 1 ] || {{ echo "{TIMED_OUT}" >&2; exit 1; }}\n{SUBMITS}\necho $id')
        done = slurm.submit()
        assert (done.returncode, done.stdout) == (0, "101\n")
        assert slurm.count("sbatch") == 2

    def test_one_beyond_a_limit_was_not_queued_and_is_sent_again(self, slurm: Slurm) -> None:
        refusal = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates"
        slurm.add("sbatch", f'[ $calls -gt 1 ] || {{ echo "{refusal}" >&2; exit 1; }}\n{SUBMITS}\necho $id')
        done = slurm.submit()
        assert (done.returncode, done.stdout) == (0, "100\n")
        assert (slurm.count("sbatch"), slurm.count("squeue")) == (2, 0)

    @pytest.mark.parametrize("end", ["closed", "killed"])
    @pytest.mark.parametrize("said", [TIMED_OUT, "sbatch: error: AssocMaxSubmitJobLimit"])
    def test_one_that_waits_is_given_up_when_its_run_is_over(self, slurm: Slurm, end: str, said: str) -> None:
        slurm.add("sbatch", f'echo "{said}" >&2; exit 1')
        run = subprocess.Popen(["sleep", "60"])
        slurm.environment |= {"LORASWEEP_RUN": str(run.pid), "LORASWEEP_DRIVER": sys.executable}
        slurm.records.mkdir()
        command = ["sbatch", "--job-name", "run", "--comment", COMMENT, "--wrap=true"]
        waiting = subprocess.Popen(command, env=slurm.environment, stderr=subprocess.PIPE)
        while not slurm.count("sbatch"):
            time.sleep(0.05)
        if end == "closed":
            (slurm.records / "closed").touch()
        else:
            run.kill()
            run.wait()
        assert waiting.wait() == 1
        assert slurm.count("sbatch") == 1
        # And what comes later is not sent at all.
        done = slurm.submit()
        assert (done.returncode, slurm.count("sbatch")) == (1, 1)
        assert "the run is over" in done.stderr
        run.kill()
        run.wait()

    def test_one_that_is_refused_for_good_is_told_at_once(self, slurm: Slurm) -> None:
        refusal = "sbatch: error: Batch job submission failed: Invalid qos specification"
        slurm.add("sbatch", f'echo "{refusal}" >&2; exit 1')
        done = slurm.submit()
        assert (done.returncode, done.stderr.strip(), slurm.count("sbatch")) == (1, refusal, 1)

    def test_a_site_that_prints_notices_gets_its_job_noted(self, slurm: Slurm) -> None:
        slurm.add("sbatch", f'{SUBMITS}\necho "Welcome. 3 GPUs are free."; echo $id')
        assert slurm.submit().stdout.endswith("\n100\n")
        assert (slurm.records / "jobs/100.json").is_file()

    def test_a_script_from_standard_input_is_sent_each_time_and_waits_for_its_turn(self, slurm: Slurm) -> None:
        slurm.add("sbatch", f'cat > $queue.script; [ $calls -gt 1 ] || {{ echo "{TIMED_OUT}" >&2; exit 1; }}; echo 100')
        command = ["sbatch", "--job-name", "run", "--comment", COMMENT, "/dev/stdin"]
        done = subprocess.run(
            command, env=slurm.environment, input="#!/bin/sh\ntrue 'a b'", capture_output=True, text=True
        )
        assert done.stdout == "100\n"
        script = slurm.folder / "queue.script"
        environment = slurm.environment | {"SLURM_JOB_ID": "100"}
        assert f"turn {COMMENT}" in script.read_text()
        assert subprocess.run(["sh", script], env=environment).returncode == 0
        assert json.loads((slurm.records / "jobs/100.json").read_text())["state"] == "COMPLETED"

    def test_a_job_of_somebody_else_is_submitted_as_it_is(self, slurm: Slurm) -> None:
        slurm.add("sbatch", f"{SUBMITS}\necho $id")
        assert slurm.call("sbatch", "--parsable", "--wrap=true").stdout == "100\n"
        assert (slurm.folder / "queue.wrap").read_text() == "--wrap=true\n"


def test_a_step_that_cannot_be_created_is_created_later(slurm: Slurm) -> None:
    refusal = "srun: error: Unable to create step for job 7: Unable to contact slurm controller (connect failure)"
    slurm.add("srun", f'[ $calls -gt 1 ] || {{ echo "{refusal}" >&2; exit 1; }}\n"$@"')
    done = slurm.call("srun", "sh", "-c", "echo done; echo error >&2; exit 5")
    assert (done.returncode, done.stdout) == (5, "done\n")
    assert done.stderr.endswith("error\n")
    assert slurm.count("srun") == 2


def test_a_program_that_has_run_is_not_run_again(slurm: Slurm) -> None:
    slurm.add("srun", f'echo "{TIMED_OUT}" >&2; exit 1')
    assert slurm.call("srun", "true").returncode == 1
    assert slurm.count("srun") == 1


class TestTurn:
    @pytest.fixture
    def start(self, slurm: Slurm) -> Start:
        def start(job: str, command: str) -> "subprocess.Popen[str]":
            turn = [slurm.python, "-E", "-S", slurm_commands.__file__, "turn", COMMENT, f"mark{job}", command]
            environment = slurm.environment | {"SLURM_JOB_ID": job}
            return subprocess.Popen(turn, env=environment, stdout=subprocess.PIPE, text=True)

        slurm.add("squeue", 'case "$*" in *jobs=7*) cat $queue.7;; *) echo RUNNING;; esac')
        (slurm.folder / "queue.7").write_text("RUNNING\n")
        return start

    def begin(self, slurm: Slurm, start: Start) -> "subprocess.Popen[str]":
        first = start("7", f"echo 7 >> {slurm.queue}.ran; while [ ! -e {slurm.queue}.go ]; do sleep 0.05; done")
        while not (slurm.folder / "queue.ran").exists():
            time.sleep(0.05)
        return first

    def begin_and_die(self, slurm: Slurm, start: Start) -> None:
        first = self.begin(slurm, start)
        first.kill()
        first.wait()
        (slurm.folder / "queue.go").touch()

    def test_the_second_waits_and_takes_over_what_the_first_did(self, slurm: Slurm, start: Start) -> None:
        first = self.begin(slurm, start)
        second = start("8", f"echo 8 >> {slurm.queue}.ran")
        assert second.stdout
        assert "SLURM job 7 on " in second.stdout.readline()
        (slurm.folder / "queue.go").touch()
        assert (first.wait(), second.wait()) == (0, 0)
        assert (slurm.folder / "queue.ran").read_text() == "7\n"
        states = {job: json.loads((slurm.records / f"jobs/{job}.json").read_text())["state"] for job in ("7", "8")}
        assert states == {"7": "COMPLETED", "8": "COMPLETED"}
        assert not list((slurm.records / "turns").iterdir())

    def test_the_second_does_what_a_dead_one_did_not(self, slurm: Slurm, start: Start) -> None:
        self.begin_and_die(slurm, start)
        second = start("8", f"echo 8 >> {slurm.queue}.ran")
        assert second.stdout
        assert "SLURM job 7 on " in second.stdout.readline()
        (slurm.folder / "queue.7").write_text("FAILED\n")
        assert second.wait() == 0
        assert (slurm.folder / "queue.ran").read_text() == "7\n8\n"

    def test_a_job_that_is_queued_again_goes_on_at_once(self, slurm: Slurm, start: Start) -> None:
        self.begin_and_die(slurm, start)
        again = start("7", f"echo again >> {slurm.queue}.ran")
        assert again.wait() == 0
        assert (slurm.folder / "queue.ran").read_text() == "7\nagain\n"

    def test_a_job_of_a_submission_that_is_done_does_nothing(self, slurm: Slurm, start: Start) -> None:
        assert start("9", f"echo first >> {slurm.queue}.ran").wait() == 0
        (slurm.records / "done/mark9").rename(slurm.records / "done/mark8")
        assert start("8", f"echo ghost >> {slurm.queue}.ran").wait() == 0
        assert (slurm.folder / "queue.ran").read_text() == "first\n"

    def test_it_outlives_a_signal_that_its_command_outlives(self, slurm: Slurm, start: Start) -> None:
        first = self.begin(slurm, start)
        first.send_signal(signal.SIGTERM)
        (slurm.folder / "queue.go").touch()
        assert first.wait() == 0
        assert not list((slurm.records / "turns").iterdir())

    def test_one_that_fails_says_so(self, slurm: Slurm, start: Start) -> None:
        assert start("9", "exit 3").wait() == 3
        assert json.loads((slurm.records / "jobs/9.json").read_text())["state"] == "FAILED"
        assert list_marks(slurm) == ["9.FAILED"]

    def test_one_that_does_well_leaves_its_mark_when_all_is_done(self, slurm: Slurm, start: Start) -> None:
        first = self.begin(slurm, start)
        assert list_marks(slurm) == []
        (slurm.folder / "queue.go").touch()
        assert first.wait() == 0
        assert list_marks(slurm) == ["7.COMPLETED"]

    def test_the_mark_of_an_earlier_attempt_is_gone_while_the_job_runs_again(self, slurm: Slurm, start: Start) -> None:
        assert start("7", "exit 3").wait() == 3
        again = self.begin(slurm, start)
        assert list_marks(slurm) == []
        (slurm.folder / "queue.go").touch()
        assert again.wait() == 0
        assert list_marks(slurm) == ["7.COMPLETED"]

    def test_a_job_that_dies_leaves_no_mark(self, slurm: Slurm, start: Start) -> None:
        self.begin_and_die(slurm, start)
        assert list_marks(slurm) == []

    def test_a_step_gets_the_options_of_its_call_and_not_those_of_the_allocation(
        self, slurm: Slurm, start: Start
    ) -> None:
        slurm.environment |= {
            "SLURM_GPUS": "1",
            "SRUN_CPUS_PER_TASK": "4",
            "SBATCH_QOS": "low",
            "SLURM_SUBMIT_DIR": "/",
        }
        assert start("9", f"env > {slurm.queue}.env").wait() == 0
        names = {line.partition("=")[0] for line in (slurm.folder / "queue.env").read_text().splitlines()}
        assert {name for name in names if name.startswith(("SLURM_", "SRUN_", "SBATCH_"))} == {
            "SLURM_JOB_ID",
            "SLURM_SUBMIT_DIR",
        }


def list_marks(slurm: Slurm) -> list[str]:
    return sorted(mark.name for mark in (slurm.records / "ended").glob("*"))


def test_squeue_is_called_again_only_some_seconds_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [1000.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setenv("LORASWEEP_SLURM", str(tmp_path))
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "time", lambda: clock[0])
    monkeypatch.setattr(slurm_commands, "find_command", lambda name: "true")
    for seconds in (2.0, 1.0, 60.0, 0.0):
        slurm_commands.ask("squeue")
        slurm_commands.ask("sacct")
        clock[0] += seconds
    assert slept == [3.5, 4.5]


def test_a_limit_on_jobs_is_waited_for_longer_than_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def wait(reason: str) -> float:
        began = sum(slept)
        return sum(slept) - began if outage.wait(reason) else 0.0

    monkeypatch.delenv("LORASWEEP_SLURM", raising=False)
    monkeypatch.setenv("LORASWEEP_PATIENCE", "90")
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(slept))
    outage = slurm_commands.Outage("sbatch")
    assert [wait("sbatch: error: AssocGrpSubmitJobsLimit") for _ in range(100)] == [5.0] + 99 * [10.0]
    assert [wait(TIMED_OUT) for _ in range(4)] == [10.0, 20.0, 40.0, 0.0]


def test_a_holder_without_a_sign_of_life_is_dead_by_the_clock_of_the_one_who_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "turns/key"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"job": "7", "host": "a", "beat": 0}))
    os.utime(lock, (2**32, 2**32))  # a clock that is wrong
    monkeypatch.setattr(slurm_commands, "_has_ended", lambda job: None)
    monkeypatch.setattr(slurm_commands, "_DEAD", 1.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: threading.Event().wait(0.05))
    assert not slurm_commands._wait_for_turn(lock, "8", tmp_path)
    assert json.loads(lock.read_text())["job"] == "8"


@pytest.mark.parametrize(("cluster", "waits"), [("here", False), ("elsewhere", True)])
def test_slurm_is_believed_about_jobs_of_its_own_cluster_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, waits: bool
) -> None:
    lock, naps = tmp_path / "turns/key", []
    lock.parent.mkdir()
    lock.write_text(json.dumps({"job": "7", "cluster": cluster, "host": "a", "beat": 0}))

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        threading.Event().wait(0.05)

    monkeypatch.setenv("SLURM_CLUSTER_NAME", "here")
    monkeypatch.setattr(slurm_commands, "_has_ended", lambda job: True)
    monkeypatch.setattr(slurm_commands, "_DEAD", 0.5)
    monkeypatch.setattr(time, "sleep", sleep)
    assert not slurm_commands._wait_for_turn(lock, "8", tmp_path)
    assert bool(naps) == waits
