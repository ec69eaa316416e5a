"""What the workflow adds to the SLURM executor plugin, whose query is stood in for; SLURM itself is in tests/slurm."""

import asyncio
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import snakemake_executor_plugin_slurm as plugin
from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm_jobstep import get_gpu_setting, get_node_setting

from lorasweep import slurm


def query(monkeypatch: pytest.MonkeyPatch, answers: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    async def answer(command: str, logger: object) -> tuple[Any, Any]:
        return answers.pop(0)

    monkeypatch.setattr(plugin, "query_job_status", answer)
    monkeypatch.setattr(slurm, "SECONDS_BETWEEN_QUERIES", 0)
    slurm.mend_status_queries()
    return asyncio.run(plugin.query_job_status("sacct", None))


def test_a_cancelled_job_has_the_state_that_the_plugin_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"1": "CANCELLED by 1000", "2": "RUNNING", "3": "COMPLETED"}
    states, seconds = query(monkeypatch, [(said, 0.1)])
    assert states == {"1": "CANCELLED", "2": "RUNNING", "3": "COMPLETED"}
    assert seconds == 0.1


def test_a_query_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = query(monkeypatch, [(None, None), (None, None), ({"1": "RUNNING"}, 0.1)])
    assert states == {"1": "RUNNING"}


def test_a_query_without_jobs_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert query(monkeypatch, [({}, 0.1)]) == ({}, 0.1)


def test_orphans_are_read_from_names_states_and_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "7|lorasweep_a|RUNNING|rule_train_wildcards_lora_rank=8,lr=1e-4",
        "8|lorasweep_a|PENDING|rule_train_wildcards_lora_rank=16",
        "9|lorasweep_a|RUNNING|rule_evaluate_merged_wildcards_x",
    ]
    monkeypatch.setattr(slurm, "_ask", lambda *command: lines)
    orphans = slurm.find_orphans(["lorasweep_a"])
    assert [(o.job, o.rule, o.point, o.is_awaited) for o in orphans] == [
        ("7", "train", "lora_rank=8,lr=1e-4", True),
        ("8", "train", "lora_rank=16", False),
        ("9", "evaluate_merged", "x", False),
    ]


def test_without_an_earlier_run_slurm_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda *command: pytest.fail("asked"))
    assert slurm.find_orphans([]) == []


def test_a_slurm_that_does_not_answer_stops_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*command: str) -> list[str]:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(slurm, "_ask", fail)
    assert slurm.find_orphans(["lorasweep_a"]) == []
    assert "is not known" in caplog.text


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
