"""The ledger and what it is made of: attempts of jobs, runs, samples of the disk; and what the next plan learns."""

import csv
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorasweep.planning.history import JobRecord, append_records, get_last_error, learn, read_records
from lorasweep.planning.planner import PointPlan, SweepPlan
from lorasweep.planning.timeline import Timeline
from lorasweep.running.events import JobWatcher, measure_temporary
from lorasweep.running.ledger import RunRecord, describe_ledger, make_ledger, read_runs, record_run, write_ledger


def make_record(**changes: Any) -> JobRecord:
    values = {"run": "1", "rule": "train", "name": "a", "members": "a", "state": "done", "seconds": 30.0, "gpus": 1}
    values |= {"is_queued": False, "planned_seconds": 20.0, "modelled_seconds": 10.0, "device": "a100", "base": "x"}
    return JobRecord.model_validate(values | changes)


def make_same(seconds: float) -> JobRecord:
    return make_record(seconds=seconds)


def make_point(name: str, mode: str = "B2", kept: int = 100) -> PointPlan:
    return PointPlan(
        name,
        mode,
        is_done=True,
        steps=1,
        tokens=1,
        kept_bytes=kept,
        kept_bytes_by_mode={},
        temporary_bytes=0,
        written_bytes=0,
        seconds={},
        gpu_hours=0,
        mem_mb=1,
    )


WHOLE = SweepPlan(
    kept_bytes=0,
    temporary_bytes=6,
    written_bytes=0,
    jobs={},
    seconds={},
    gpu_seconds={},
    steps=0,
    tokens=0,
    wall_seconds=8.0,
    mem_mb=0,
    timeline=Timeline(),
)


def test_records_are_read_as_they_were_written_but_for_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "e/jobs.csv"
    records = [make_record(), make_record(rule="evaluate_adapters", members="a;b", state="failed", is_queued=True)]
    append_records(records[:1], file)
    append_records(records[1:], file)
    with file.open("a") as stream:
        stream.write("1,train,c")
    assert read_records(file) == records
    append_records(records[:1], file)
    assert read_records(file) == [*records, records[0]]
    assert read_records(tmp_path / "none.csv") == []


def test_a_rule_learns_from_the_same_device_and_first_from_the_same_model() -> None:
    records = [
        make_record(base="y", seconds=100.0),
        make_record(device="h100", seconds=5.0),
        make_record(state="failed", seconds=1.0),
        make_record(is_queued=True, seconds=9000.0),
        make_record(rule="merge", base="y", seconds=40.0),
    ]
    assert learn([records[:1] + records[3:]], "a100", "x")["train"].factor == 10.0
    assert learn([[*records, *map(make_same, (30.0, 20.0))]], "a100", "x")["train"].factor == 2.5
    assert learn([records], "a100", "x")["merge"].factor == 4.0
    assert learn([records], "v100", "x") == {}


def test_nothing_is_learnt_from_the_attempt_after_one_that_failed_in_the_same_experiment() -> None:
    failed, done = make_record(state="failed"), make_record(seconds=20.0)
    # It may have had the rest alone to do.
    assert learn([[failed, done]], "a100", "x") == {}
    assert learn([[failed, done, make_same(30.0)]], "a100", "x")["train"].factor == 3.0
    # A job of another experiment has the same name.
    assert learn([[failed], [done]], "a100", "x")["train"].factor == 2.0


def test_the_last_run_is_compared_with_its_plan() -> None:
    records = [make_record(run="1"), make_record(run="2", seconds=60.0), make_record(run="2", state="failed")]
    assert get_last_error(records) == 3.0
    assert get_last_error([make_record(state="failed")]) is None


def test_the_ledger_counts_failed_work_and_shares_a_batch(tmp_path: Path) -> None:
    for name, size in {"a": 90, "b": 110}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({"bytes": size}))
    records = [
        make_record(seconds=100.0, state="failed"),
        make_record(seconds=3600.0),
        make_record(rule="evaluate_adapters", name="a+1", members="a;b", seconds=0.0, state="failed"),
        make_record(rule="evaluate_adapters", name="a+1", members="a;b", seconds=7200.0),
    ]
    runs = [
        RunRecord(
            began="1", wall_seconds=9.0, peak_temporary_bytes=5, planned_wall_seconds=8.0, planned_temporary_bytes=6
        )
    ]
    rows = make_ledger(
        tmp_path,
        [make_point("a"), make_point("b"), make_point("c")],
        records,
        runs,
        dict.fromkeys("abc", 10_000),
        WHOLE,
    )
    a, b, c, total = rows
    assert (a["attempts"], a["failed_attempts"], a["failed_seconds"]) == (4, 2, 100)
    assert (total["attempts"], total["failed_attempts"]) == (4, 2)
    assert a["gpu_hours"] == pytest.approx(2 + 100 / 3600, abs=0.001)
    assert b["job_seconds"] == 3600
    assert (a["kept_bytes"], b["kept_bytes"], c["kept_bytes"], c["is_done"]) == (90, 110, 0, False)
    assert (total["kept_bytes"], total["planned_kept_bytes"], total["peak_temporary_bytes"]) == (200, 300, 5)
    said = describe_ledger(rows)
    assert "Kept: 200 B by 2 points (planned 200 B); as full models 20 kB, 100.0 times as much." in said
    assert "Temporary files, peak: 5 B (planned 6 B)." in said
    assert "with 2 failed attempts of 2 min" in said
    write_ledger(rows, tmp_path / "ledger.csv")
    with (tmp_path / "ledger.csv").open() as stream:
        assert [row["point"] for row in csv.DictReader(stream)] == ["a", "b", "c", "total"]


def test_the_total_has_what_was_spent_on_points_that_left_the_sweep(tmp_path: Path) -> None:
    left = [make_record(name="gone", members="gone", state=state, seconds=1800.0) for state in ("failed", "done")]
    batch = make_record(rule="evaluate_adapters", name="a+1", members="a;gone", seconds=100.0)
    a, total = make_ledger(tmp_path, [make_point("a")], [make_record(), *left, batch], [], {}, WHOLE)
    assert (a["job_seconds"], a["planned_job_seconds"]) == (30 + 50, 20 + 10)
    assert (total["job_seconds"], total["failed_seconds"], total["failed_attempts"]) == (3730, 1800, 1)
    assert (total["planned_job_seconds"], total["gpu_hours"]) == (20 + 20 + 20, round(3730 / 3600, 3))


def test_the_ledger_has_how_busy_gpus_and_cores_were_of_jobs_that_failed_too(tmp_path: Path) -> None:
    def leave(rule: str, name: str, **usage: Any) -> None:
        (tmp_path / "benchmarks" / rule).mkdir(parents=True, exist_ok=True)
        (tmp_path / "benchmarks" / rule / f"{name}.json").write_text(json.dumps({"seconds": 100, "cores": 4, **usage}))

    leave("train", "a-123", gpus=1, gpu_busy=0.2, peak_gpu_memory_bytes=7, cpu_busy=0.5)
    for name in "ab":
        leave("evaluate_adapters", name, gpus=1, gpu_busy=0.8, cpu_busy=0.1, points=2)
    (tmp_path / "benchmarks/train/b-123.json").write_text('{"seconds": 1')  # cut short
    records = [
        make_record(state="failed"),
        make_record(name="b", members="b"),
        make_record(rule="evaluate_adapters", name="a+1", members="a;b"),
    ]
    points, trainings = [make_point(name) for name in "abc"], {"a": "a-123", "b": "b-123"}
    runs = [
        RunRecord(began="1", wall_seconds=9, peak_temporary_bytes=5, planned_wall_seconds=8, planned_temporary_bytes=6)
    ]
    rows = make_ledger(tmp_path, points, records, runs, dict.fromkeys("abc", 10), WHOLE, trainings)
    a, b, c, total = ({key: row[key] for key in ("gpu_busy", "peak_gpu_memory_bytes", "cpu_busy")} for row in rows)
    assert a == {"gpu_busy": 0.4, "peak_gpu_memory_bytes": 7, "cpu_busy": pytest.approx(0.367)}
    assert b == {"gpu_busy": 0.8, "peak_gpu_memory_bytes": None, "cpu_busy": 0.1}
    assert set(c.values()) == {None}
    assert total["gpu_busy"] == 0.5
    # A job that decides which trainings go on is shared by those that compete.
    leave("prune", "after=1", gpus=1, gpu_busy=0.1)
    records.append(make_record(rule="prune", name="after=1", members="a;b"))
    *_, b, _, total = make_ledger(tmp_path, points, records, runs, dict.fromkeys("abc", 10), WHOLE, trainings)
    assert (b["gpu_busy"], total["gpu_busy"]) == (
        pytest.approx((0.8 + 0.1) / 2),
        pytest.approx((0.5 * 2 + 0.1) / 3, abs=0.001),
    )
    assert "in which the GPUs were busy for 50% of the time" in describe_ledger(rows)


def test_what_pruning_saved_is_counted_once_at_the_trainings_own_speed(tmp_path: Path) -> None:
    pruned = {"after": 1, "epochs": 4, "seconds": 20.0}
    manifest = {"finished": "2", "bytes": 1, "device": "cuda", "settings": {"gpus": 2}, "training": {"pruned": pruned}}
    finished = manifest | {"training": {}}
    for name, content in {"a": manifest, "b": manifest, "c": finished}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps(content))
    # Another point uses the training of a.
    points = [make_point("a"), replace(make_point("b"), steps=0), make_point("c")]
    run = RunRecord(
        began="1", wall_seconds=1, peak_temporary_bytes=0, planned_wall_seconds=1, planned_temporary_bytes=0
    )
    rows = make_ledger(tmp_path, points, [], [run], {}, WHOLE)
    saved = [(row["epochs_saved"], row["seconds_saved"], row["gpu_hours_saved"]) for row in rows]
    assert saved == [(3, 60.0, 0.033), (0, 0, 0), (0, 0, 0), (3, 60.0, 0.033)]
    said = describe_ledger(rows).splitlines()[-1]
    assert said == "Pruned: 1 training stopped, 3 epochs not trained: saved 60 s, 0.03 GPU hours at their own speed."
    assert "Pruned" not in describe_ledger(make_ledger(tmp_path, points[2:], [], [run], {}, WHOLE))


def test_runs_add_up(tmp_path: Path) -> None:
    run = RunRecord(
        began="1", wall_seconds=9.0, peak_temporary_bytes=5, planned_wall_seconds=8.0, planned_temporary_bytes=6
    )
    later = run.model_copy(update={"began": "2"})
    for record in (run, later, later):
        record_run(record, tmp_path / "runs.json")
    assert read_runs(tmp_path / "runs.json") == [run, later]


def say(watcher: JobWatcher, text: str | None = None, **extra: Any) -> None:
    watcher.emit(logging.makeLogRecord({"msg": text, **extra}))


def test_each_attempt_of_a_job_is_seen_with_its_slurm_job() -> None:
    watcher = JobWatcher({"t-123": "a"})
    say(watcher, event="job_info", jobid=3, rule_name="train", wildcards={"training": "t-123"}, log=[])
    for slurm_job, ended in (
        ("17", {"event": "job_error", "jobid": 3}),
        ("18", {"event": "job_finished", "job_id": 3}),
    ):
        say(watcher, event="job_started", jobs=[3])
        say(watcher, f"Job 3 has been submitted with SLURM jobid {slurm_job} (log: x).")
        say(watcher, **ended)
    assert [(a.rule, a.name, a.state, a.slurm_job) for a in watcher.attempts] == [
        ("train", "a", "failed", "17"),
        ("train", "a", "done", "18"),
    ]


def test_temporary_files_are_measured_and_kept_ones_not(tmp_path: Path) -> None:
    for name, size in {
        ".scratch/merged/a/model": 1000,
        "a/adapter/w": 10_000,
        "a/.hf_model.partial/w": 10_000,
        "trainings/b/state/train/x": 100,
        "trainings/kept/epoch=1/w": 10_000,
        "trainings/undecided/epoch=1/w": 10,
        "trainings/undecided/epoch=last/w": 1,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x" * size)
    assert measure_temporary(tmp_path, ["a", "trainings/b", "trainings/kept", "not_begun"]) == 1100
    assert measure_temporary(tmp_path, ["trainings/undecided"]) == 1011


def test_what_still_runs_at_the_end_was_cancelled() -> None:
    watcher = JobWatcher({})
    say(watcher, event="job_info", jobid=3, rule_name="train", wildcards={"training": "a"}, log=[])
    say(watcher, event="job_started", jobs=[3])
    watcher.end_all()
    assert [(attempt.rule, attempt.state) for attempt in watcher.attempts] == [("train", "cancelled")]
