"""What the workflow adds to the SLURM executor plugin, whose query is stood in for; SLURM itself is in tests/slurm."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm_jobstep import get_gpu_setting, get_node_setting

from lorasweep.running import orphans, outages, slurm_plugin
from lorasweep.running.end_marks import EndWatch
from lorasweep.running.events import find_reason
from lorasweep.running.outages import OutageWatcher, PendingReasons
from lorasweep.util import slurm, slurm_commands
from lorasweep.util.errors import InputError

WORKFLOW = str(Path(__file__).parents[3] / "workflow")


def write_command(folder: Path, name: str, script: str) -> None:
    """Write a program that stands for one of SLURM's."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def query(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    async def answer(command: str, logger: object) -> tuple[Any, Any]:
        return answers.pop(0)

    monkeypatch.setattr(plugin, "query_job_status", answer)
    monkeypatch.setattr(slurm_commands, "_FIRST_PAUSE", 0)
    watch = EndWatch()
    watch.jobs = {"1", "2", "3", "4"}
    slurm_plugin.mend_status_queries(watch)
    return asyncio.run(plugin.query_job_status("sacct", None))


def test_a_cancelled_job_has_the_state_that_the_plugin_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"1": "CANCELLED by 1000", "2": "RUNNING", "3": "COMPLETED"}
    states, seconds = query(monkeypatch, [(said, 0.1)])
    assert states == {"1": "CANCELLED", "2": "RUNNING", "3": "COMPLETED"}
    assert seconds == 0.1


@pytest.mark.parametrize("lost", ["PREEMPTED", "NODE_FAIL"])
def test_a_job_that_was_lost_and_is_not_queued_again_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: str
) -> None:
    monkeypatch.setenv("LORASWEEP_SLURM", str(tmp_path))
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/1.json").write_text(json.dumps({"state": "WAITING"}))
    said = [lost, "PENDING", lost, lost]
    answers: list[tuple[Any, Any]] = [({"1": state}, 0.1) for state in said]
    monkeypatch.setattr(slurm_plugin, "SECONDS_TO_QUEUE_AGAIN", -1)
    assert query(monkeypatch, answers)[0] == {"1": "CANCELLED"}
    monkeypatch.setattr(slurm_plugin, "SECONDS_TO_QUEUE_AGAIN", 60)
    assert [asyncio.run(plugin.query_job_status("squeue", None))[0]["1"] for _ in range(3)] == said[1:]
    # It does not end earlier or later because SLURM knows it.
    begun = time.monotonic()
    answers += [({"1": lost}, 0.1), ({"1": lost}, 0.1)]
    monkeypatch.setattr(time, "monotonic", lambda: begun + 61)
    assert [asyncio.run(plugin.query_job_status("squeue", None))[0]["1"] for _ in range(2)] == ["CANCELLED"] * 2


def test_a_query_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = query(monkeypatch, [(None, None), (None, None), ({"1": "RUNNING"}, 0.1)])
    assert states == {"1": "RUNNING"}


def test_a_job_that_slurm_has_forgotten_has_its_own_word_for_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORASWEEP_SLURM", str(tmp_path))
    (tmp_path / "jobs").mkdir()
    for job, state in {"1": "WAITING", "2": "COMPLETED", "3": "FAILED", "4": "SUBMITTED"}.items():
        (tmp_path / f"jobs/{job}.json").write_text(json.dumps({"state": state}))
    known = {"1": "RUNNING"}
    assert query(monkeypatch, [(dict(known), 0.1)])[0] == {**known, "2": "COMPLETED", "3": "FAILED"}
    monkeypatch.setattr(slurm_plugin, "SECONDS_TO_REAPPEAR", -1)
    assert query(monkeypatch, [(dict(known), 0.1)])[0]["4"] == "CANCELLED"


def test_the_logs_of_a_sweep_are_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plugin, "_select_logdir", plugin._select_logdir)
    slurm_plugin.mend_log_folder(tmp_path)
    settings = SimpleNamespace(logdir=None)
    workflow = SimpleNamespace(executor_settings=settings, workdir_init="/somewhere")
    assert plugin._select_logdir(workflow) == tmp_path
    settings.logdir = "chosen"
    assert plugin._select_logdir(workflow) == Path("/somewhere/chosen")


def test_a_query_without_jobs_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert query(monkeypatch, [({}, 0.1)]) == ({}, 0.1)


def test_an_outage_is_told_once_then_ever_more_seldom_and_at_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher, folder = OutageWatcher(tmp_path), tmp_path / "outages"
    folder.mkdir()
    record = {"command": "sbatch", "since": time.time() - 5, "tries": 2, "reason": "timed out"}
    record |= {"host": socket.gethostname(), "pid": os.getpid()}
    (folder / "a.json").write_text(json.dumps(record))
    assert watcher.look() == ""  # it may be over at once
    (folder / "b.json").write_text(json.dumps(record | {"since": time.time() - 20, "tries": 3}))
    line = watcher.look()
    assert line.startswith("SLURM has not answered sbatch since ")
    assert "asked 5 times: timed out" in line
    assert watcher.look() == line
    assert caplog.messages == [line]
    (folder / "b.json").write_text(json.dumps(record | {"since": time.time() - 50, "tries": 4}))
    watcher.look()
    assert len(caplog.messages) == 2
    (folder / "a.json").unlink()
    (folder / "b.json").write_text(json.dumps(record | {"pid": 2**22 + 1}))  # it was killed
    (folder / "c.json").write_text(json.dumps(record | {"host": "elsewhere"}))
    os.utime(folder / "c.json", (0, 0))
    assert watcher.look() == watcher.look() == ""
    assert caplog.messages[2:] == ["SLURM answers again, after 50 s."]


def test_a_limit_on_jobs_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watcher, file = OutageWatcher(tmp_path), tmp_path / "outages/a.json"
    file.parent.mkdir()
    record = {"command": "sbatch", "tries": 2, "reason": "sbatch: error: QOSMaxSubmitJobPerUserLimit"}
    record |= {"host": socket.gethostname(), "pid": os.getpid()}
    for _ in range(2):
        file.write_text(json.dumps(record | {"since": time.time() - 20}))
        line = watcher.look()
        assert line.startswith("SLURM has taken no further job since ")
        assert "asked 2 times: sbatch: error: QOSMaxSubmitJobPerUserLimit. " in line
        file.unlink()
        assert watcher.look() == ""
    assert len(caplog.messages) == 1
    # Another outage is told of as ever.
    file.write_text(json.dumps(record | {"reason": "timed out", "since": time.time() - 20}))
    assert watcher.look().startswith("SLURM has not answered sbatch since ")
    assert len(caplog.messages) == 2


def test_a_reason_that_never_passes_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    reasons = PendingReasons()
    waiting = {"1": "Resources", "2": "AssocGrpGRES", "3": "JobHeldUser", "4": "QOSMaxGRESPerUser", "5": "Dependency"}
    reasons.note(waiting)
    assert caplog.messages == []
    never = ("PartitionTimeLimit", "AssocMaxWallDurationPerJobLimit", "QOSMaxGRESPerJob", "DependencyNeverSatisfied")
    for _ in range(2):
        reasons.note(waiting | {f"1{number}": reason for number, reason in enumerate(never)})
    assert [message.partition(". Change")[0] for message in caplog.messages] == [
        f"SLURM will not start job 1{number}: {reason}" for number, reason in enumerate(never)
    ]


def test_only_jobs_of_the_run_are_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(outages, "ask", lambda *_: ["1|Resources", "2|PartitionTimeLimit", "3|PartitionTimeLimit"])
    reasons = PendingReasons()
    reasons.get({"1", "3"})
    while not caplog.messages:  # a thread asks
        time.sleep(0.01)
    assert reasons.get({"1", "3"}) == {"1": "Resources", "3": "PartitionTimeLimit"}
    assert [message.partition(":")[0] for message in caplog.messages] == ["SLURM will not start job 3"]


def test_the_time_of_a_job_that_was_queued_again_is_that_of_all_its_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Of job 7 there was one before the ids began anew.
    lines = ["7|900|other", "7|100|run", "7|20|run", "8|5|run", "9||run"]
    script = 'case "$*" in *--duplicates*) printf "' + "\\n".join(lines) + '\\n";; esac'
    write_command(tmp_path, "sacct", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.read_elapsed(["7", "8", "9"]) == {"7": 120.0, "8": 5.0}
    assert slurm.read_elapsed([]) == {}


def test_a_job_that_has_ended_before_it_is_cancelled_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refusal = "scancel: error: Kill job error on job id 7: Invalid job id specified"
    write_command(tmp_path, "scancel", f"echo '{refusal}' >&2; exit 1")
    write_command(tmp_path, "squeue", "echo 9")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.cancel_jobs(["7"]) == set()
    monkeypatch.setattr(slurm, "SECONDS_TO_CANCEL", 1)
    assert slurm.cancel_jobs(["7", "9"]) == {"9"}


def test_a_job_waits_for_the_end_of_another_beside_what_a_site_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "get_submit_command", lambda job, *_, **__: "sbatch --exclusive")
    slurm_plugin.mend_dependencies({"a": "7"}.get)
    assert plugin.get_submit_command("a", {}) == "sbatch --exclusive --dependency=afterany:7"
    assert plugin.get_submit_command("b", {}) == "sbatch --exclusive"


def test_the_time_limit_of_partitions_is_the_longest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limits = {"short*": "5:00", "long": "2-12:30:00", "all": "infinite", "hours": "2:00:00"}
    lines = "\n".join(f"{name}|{limit}" for name, limit in limits.items())
    write_command(tmp_path, "sinfo", f"echo '{lines}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    named = ("", "short", "short,hours", "long", "long,all", "unknown")
    assert [slurm.read_time_limit(name) for name in named] == [5, 5, 120, 3630, math.inf, math.inf]


@pytest.mark.parametrize(
    ("resources", "gpus"),
    [
        ({}, 0),
        ({"gpu": 2}, 2),
        ({"gres": "gpu", "gpu": 0}, 1),
        ({"gres": "gpu:4", "gpu": 0}, 4),
        ({"gres": "gpu:a100:2"}, 2),
        ({"gres": "gpu:a100"}, 1),
        ({"gres": "gpu:a100_3g.20gb:3", "gpu": 0}, 3),
        ({"gres": "gpu:3g.40gb:1", "gpu": 0}, 1),
        ({"gres": "gpu:1g.10gb"}, 1),
        ({"gres": "lscratch:100", "gpu": 1}, 1),
        ({"gres": "shard:2", "gpu": 0}, 0),
    ],
)
def test_requested_gpus_are_counted_however_a_site_has_them(resources: dict[str, Any], gpus: int) -> None:
    assert slurm_plugin._count_requested_gpus(SimpleNamespace(resources=resources)) == gpus


def test_a_submission_that_slurm_refused_is_the_reason(tmp_path: Path) -> None:
    message = "SLURM sbatch failed. The error message was 'sbatch: error: no\nsbatch: really'.\n    sbatch call:\n  x"
    reason = find_reason(tmp_path / "missing.log", message)
    assert reason == "SLURM did not take it: sbatch: error: no\nsbatch: really"


def test_the_gpus_of_a_cluster_are_counted_once_for_each_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = "a|gpu:4 \nb|gpu:a100:2(S:0-1),gpu:v100:1,mps:400\na|gpu:4 \nc|(null) \nd|gpu:a100_3g.20gb:7"
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm.count_gpus.cache_clear()
    assert slurm.count_gpus() is None
    write_command(tmp_path, "sinfo", f"echo '{nodes}'")
    slurm.count_gpus.cache_clear()
    assert slurm.count_gpus() == 4 + 2 + 1 + 7
    slurm.count_gpus.cache_clear()


def test_another_version_than_the_tested_one_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slurm_plugin.warn_of_other_versions()
    assert not caplog.messages
    monkeypatch.setitem(slurm_plugin.TESTED, "snakemake", "9.0.0")
    slurm_plugin.warn_of_other_versions()
    [message] = caplog.messages
    assert "lorasweep was tested with 9.0.0" in message


def test_a_run_that_is_told_to_end_while_it_chooses_jobs_ends() -> None:
    lock, told = threading.Lock(), threading.Event()

    class Scheduler:
        def exit_gracefully(self, *arguments: object) -> None:
            with lock:
                told.set()

    before = signal.getsignal(signal.SIGTERM)
    try:
        slurm_plugin.mend_end_by_signal(Scheduler())
        with lock:  # as Snakemake holds its own while it chooses
            signal.raise_signal(signal.SIGTERM)
            assert not told.is_set()
        assert told.wait(timeout=600)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_orphans_are_read_from_names_states_and_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "7|lorasweep_a|RUNNING|rule_train_wildcards_lora_rank=8__lr=1e-4 0123456789ab",
        "8|lorasweep_a|PENDING|rule_train_wildcards_lora_rank=16",
        "9|lorasweep_a|RUNNING|rule_evaluate_wildcards_x",
    ]
    monkeypatch.setattr(orphans, "ask_patiently", lambda *command: lines)
    found = orphans.find_orphans(["lorasweep_a"])
    assert [(o.job, o.rule, o.name, o.is_awaited) for o in found] == [
        ("7", "train", "lora_rank=8__lr=1e-4", True),
        ("8", "train", "lora_rank=16", False),
        ("9", "evaluate", "x", False),
    ]


def test_without_an_earlier_run_slurm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "ask_patiently", lambda *command: pytest.fail("asked"))
    assert orphans.find_orphans([]) == []


def test_jobs_of_an_earlier_run_that_cannot_be_looked_for_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*command: str) -> list[str]:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(orphans, "ask_patiently", fail)
    with pytest.raises(InputError, match="may still run, and cannot be looked for"):
        orphans.find_orphans(["lorasweep_a"])


@pytest.mark.parametrize(
    ("shown", "commands"),
    [
        (["JobState=RUNNING", "PreemptTime=2026-01-01T00:00:00"], 2),
        (["JobState=RUNNING", "PreemptTime=None"], 1),
        (["JobState=RUNNING"], 1),
    ],
)
def test_a_job_that_has_to_give_way_is_queued_again(
    monkeypatch: pytest.MonkeyPatch, shown: list[str], commands: int
) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str, timeout: float) -> list[str]:
        asked.append(command)
        return shown

    monkeypatch.setattr(slurm, "ask", ask)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert slurm.requeue_if_preempted() == ""
    assert not asked
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert ("was requeued" in slurm.requeue_if_preempted()) == (commands == 2)
    assert asked == [("scontrol", "show", "job", "7"), ("scontrol", "requeue", "7")][:commands]


class TestMemoryKill:
    def ask(self, monkeypatch: pytest.MonkeyPatch, **answers: list[str]) -> None:
        def answer(*command: str) -> list[str]:
            if command[0] not in answers:
                raise FileNotFoundError(command[0])
            return answers[command[0]]

        monkeypatch.setattr(slurm, "ask", answer)

    def test_accounting_says_so_of_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ask(monkeypatch, sacct=["FAILED", "FAILED", "OUT_OF_MEMORY"])
        assert slurm.find_memory_kill("7") == "SLURM job 7: OUT_OF_MEMORY, reported by sacct"

    def test_without_accounting_the_controller_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ask(monkeypatch, scontrol=["JobId=7", "   JobState=OUT_OF_MEMORY Reason=OutOfMemory"])
        assert slurm.find_memory_kill("7") == "SLURM job 7: OUT_OF_MEMORY, reported by scontrol"

    def test_its_log_says_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.ask(monkeypatch, sacct=["FAILED"])
        assert slurm.find_memory_kill("7") == ""
        monkeypatch.setenv("LORASWEEP_SLURM", str(tmp_path))
        log = tmp_path / slurm.LOGS / "rule_train/point/7.log"
        log.parent.mkdir(parents=True)
        log.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0.\n")
        assert slurm.find_memory_kill("7") == f"SLURM job 7: {log.read_text().strip()}"

    @pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "PREEMPTED", "CANCELLED by 0", "FAILED"])
    def test_what_ended_otherwise_is_not_taken_for_it(self, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
        self.ask(monkeypatch, sacct=[state, state], scontrol=[f"JobState={state}"])
        assert slurm.find_memory_kill("7") == ""


def test_a_training_on_several_gpus_is_one_task_on_one_node() -> None:
    """The plugin's own words for what the rule asks; the processes are started within the task."""
    resources = SimpleNamespace(gpu=2, nodes=1, mem_mb=1000, runtime=10)
    resources.get = lambda key, default=None: getattr(resources, key, default)
    job = SimpleNamespace(resources=resources, threads=8, is_group=lambda: False)
    said = dict.fromkeys(("run_uuid", "slurm_logfile", "comment_str", "account", "partition", "workdir"), "")
    submitted = get_submit_command(job, said) + set_gres_string(job)
    assert " --nodes=1" in submitted
    assert submitted.endswith(" --gpus=2")
    assert " --cpus-per-task=8" in submitted
    assert "--ntasks" not in submitted
    assert (get_gpu_setting(job), get_node_setting(job)) == ("--gpus=2", "--nodes=1")


def test_a_job_that_needs_no_gpu_asks_for_none_whatever_a_site_has_for_its_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plugin, "set_gres_string", set_gres_string)
    resources = SimpleNamespace(gres="gpu:h100:1", gpu=0)
    resources.get = lambda key, default=None: getattr(resources, key, default)
    jobs = [SimpleNamespace(name=name, resources=resources) for name in ("ended", "other")]
    slurm_plugin.mend_gpu_requests(lambda job: job.name == "ended")
    assert [plugin.set_gres_string(job) for job in jobs] == ["", " --gres=gpu:h100:1"]


def test_what_a_person_has_slurms_programs_show_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = ("SQUEUE_FORMAT2", "SQUEUE_PARTITION", "SACCT_FORMAT", "SCANCEL_INTERACTIVE", "SINFO_FORMAT")
    kept = ("SBATCH_QOS", "SLURM_CONF", "SLURM_JOB_ID")
    for name in (*theirs, *kept):
        monkeypatch.setenv(name, "1")
    slurm.forget_settings()
    assert not [name for name in theirs if name in os.environ]
    assert [name for name in kept if name in os.environ] == [*kept]


def test_a_job_starts_snakemake_once_as_the_step_that_the_plugin_would_have_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    executor = plugin.Executor
    for name in ("format_job_exec", "additional_general_args", "get_python_executable"):
        monkeypatch.setattr(executor, name, getattr(executor, name))
    arguments = ["{python} -m snakemake", "{options}"]
    monkeypatch.setattr(
        executor,
        "format_job_exec",
        lambda self, job: " ".join(arguments).format(
            python=self.get_python_executable(), options=self.additional_general_args()
        ),
    )
    monkeypatch.setattr(executor, "get_python_executable", lambda self: "'a b/python'")
    slurm_plugin.mend_job_commands(lambda job: job.threads == 1)
    single = object.__new__(executor)
    single.workflow = SimpleNamespace(executor_settings=SimpleNamespace(pass_command_as_script=False))
    resources = Resources({"gpu": 2, "nodes": 1})
    job = SimpleNamespace(threads=4, resources=resources)
    said = single.format_job_exec(job)
    step = "exec srun -n1 --cpu-bind=q --cpus-per-task=4 --gpus=2 --nodes=1"
    assert said.strip() == f"{step} 'a b/python' {slurm_plugin.SNAKEMAKE} -m snakemake"
    # What needs no GPU was given none.
    ended = single.format_job_exec(SimpleNamespace(threads=1, resources=resources))
    assert ended.startswith("exec srun -n1 --cpu-bind=q --cpus-per-task=1  --nodes=1 ")


def test_snakemake_in_a_job_imports_nothing_that_it_has_no_use_for() -> None:
    script = f"""
import runpy, sys
module = runpy.run_path({str(slurm_plugin.SNAKEMAKE)!r})
module["leave_out_modules"]()
import snakemake.cli
snakemake.cli.get_argument_parser()
import snakemake.common.configfile, smart_open, yte
known = {{"pandas", "docutils", "numpy", "requests", "snakemake_executor_plugin_slurm", "snakemake.executors.local"}}
print(sorted(name for name in known if sys.modules.get(name)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "['snakemake.executors.local']\n", done.stderr


class Resources(dict[str, Any]):
    __getattr__ = dict.__getitem__
