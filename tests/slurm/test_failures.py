"""What happens when something fails: docs/how-to/slurm.md, row by row, on a real SLURM, and what the next run does."""

import getpass
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import Cluster
from lorasweep.planning.history import read_records
from monkey import find_program
from slurm_sweep import ALIVE, TEXT, TRAINING_ONLY, SlurmSweep, end_time_now, get_node, wait_for
from sweep import SUMMED_UP, Sweep

DIRECT = {"merge_adapters": False, "baseline": False, "adapters_per_job": 1}
APART = ("--default-resources", "slurm_partition=apart", "mem_mb=4000", "runtime=60")


def finish(sweep: SlurmSweep, *arguments: str) -> str:
    """Give the same command again, and see it end well; the tables, which every sweep has, are left out."""
    said = sweep.run(*(arguments or ("--retries", "0")), "--until", "cleanup")
    assert sweep.plan() == SUMMED_UP
    return said


def test_a_training_that_fails_takes_no_other_point_with_it(make: Callable[..., SlurmSweep]) -> None:
    runs = [{"name": "diverges", "lr": 1e30}]
    sweep = make("one_fails", trainer="torchtune", variables={"lora_rank": [1, 2]}, runs=runs)
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.program = Sweep.program  # one test looks at its jobs when the plugin does
    done = sweep.snakemake("--retries", "0")
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert said.count(", as SLURM job ") == 3
    assert len(list(sweep.results.glob("lora_rank=*/manifest.json"))) == 2
    assert "one_fails: 2 of 3 points done, 1 failed, 0 not finished" in said
    assert "failed: train of diverges: train: the training diverged" in said
    assert "its log: results/one_fails/logs/train/diverges-" in said
    assert "To continue with what is missing: snakemake " in said
    assert sweep.plan() == {"train": 1, "take": 1, "cleanup": 1, **SUMMED_UP}


def test_what_is_edited_while_a_run_goes_on_is_for_the_next_one(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("edited", runs=[{"name": "point"}])
    sweep.edit(evaluation={**DIRECT, "max_tokens": 3})
    sweep.hold.touch()
    run = sweep.start("--retries", "0")
    sweep.wait_for("the training to run", sweep.list_jobs)
    sweep.edit(evaluation={**DIRECT, "max_tokens": 2})
    sweep.hold.unlink()
    assert sweep.wait(run) == 0, sweep.said[-4000:]
    assert json.loads((sweep.results / "point/eval/metrics.json").read_text())["spec"]["max_tokens"] == 3
    assert not (sweep.results / ".slurm/configuration").exists()
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 1, "cleanup": 1, **SUMMED_UP}


def get_time_limit(job: str) -> str:
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%l"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.long
def test_limits_of_time_and_memory_are_seen_and_retried_with_more(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("limits", runs=[{"name": "slow"}, {"name": "hungry", "seed": 1}])
    sweep.edit(evaluation=DIRECT)
    sweep.hold.touch()
    del sweep.environment["HOLD_TRAINING"]
    sweep.environment |= {"HELD_EVALUATION_OF": f"slow:{sweep.hold}", "HUNGRY_EVALUATION_OF": "hungry:2000"}
    limits = ["--set-resources", "evaluate_adapters:runtime=100*attempt", "evaluate_adapters:mem_mb=attempt*2000"]
    run = sweep.start("--retries", "1", *limits)

    def find_slow() -> set[str]:
        return {
            job for job, said in sweep.list_jobs().items() if said.startswith("rule_evaluate_adapters_wildcards_slow")
        }

    [first] = sweep.wait_for("the slow evaluation", find_slow)
    assert get_time_limit(first) == "1:40:00"
    # Before its program runs, SLURM refuses to start that, and the job has failed by itself.
    sweep.wait_for("its program", lambda: find_program(first))
    end_time_now(first)
    [second] = sweep.wait_for("its retry", lambda: find_slow() - {first})
    assert get_time_limit(second) == "3:20:00"
    sweep.hold.unlink()
    assert sweep.wait(run) == 0, sweep.said[-4000:]
    said = sweep.said
    # Killed inside srun, a job over its memory counts as failed.
    ends = re.findall(r"evaluating failed \(SLURM: (\w+)\)", said)
    assert sorted(ends) == ["FAILED", "TIMEOUT"], said[-4000:]
    assert "limits: 2 of 2 points done, 0 failed" in said
    failed = [record for record in read_records(sweep.results / "jobs.csv") if record.state == "failed"]
    assert {record.rule for record in failed} == {"evaluate_adapters"}
    # SLURM's accounting knows how long they ran, without the time in the queue.
    assert not any(record.is_queued for record in failed)
    assert f"with {len(failed)} failed attempts" in said


@pytest.mark.long  # tests/unit says so of SLURM's words
def test_a_job_over_its_memory_is_told_by_that(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("hungry", runs=[{"name": "point"}])
    sweep.edit(evaluation=DIRECT)
    sweep.environment["HUNGRY_EVALUATION_OF"] = "point:3000"
    done = sweep.snakemake("--retries", "0", "--set-resources", "evaluate_adapters:mem_mb=2000")
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert re.search(r"failed: evaluate_adapters of point-\w{6}: SLURM killed it for running out of memory", said)


def test_a_batch_is_one_job_and_what_it_had_finished_outlives_it(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("batch", variables={"seed": [0, 1, 2]})
    sweep.edit(evaluation={**DIRECT, "adapters_per_job": 3})
    sweep.hold.touch()
    del sweep.environment["HOLD_TRAINING"]
    sweep.environment["HELD_EVALUATION_OF"] = f"seed=1:{sweep.hold}"
    run = sweep.start("--retries", "0")
    sweep.wait_for(
        "the first point's result", lambda: (sweep.results / "seed=0/state/eval/done/metrics.json").is_file()
    )
    [(job, comment)] = sweep.list_jobs(ALIVE).items()
    assert comment.startswith("rule_evaluate_adapters_wildcards_seed=0+2-")
    subprocess.run(["scancel", job], check=True)
    assert sweep.wait(run) == 1
    assert "batch: 0 of 3 points done, 0 failed, 3 not finished" in sweep.said
    finished = (sweep.results / "seed=0/state/eval/done/letters.eval").read_bytes()
    del sweep.environment["HELD_EVALUATION_OF"]
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 3, "cleanup": 3, **SUMMED_UP}
    finish(sweep)
    assert (sweep.results / "seed=0/eval/letters.eval").read_bytes() == finished


@pytest.mark.usefixtures("apart")
def test_a_cancelled_job_is_noticed_whether_it_ran_or_waited(
    make: Callable[..., SlurmSweep], own_cluster: Cluster
) -> None:
    sweep = make("cancelled", variables={"lora_rank": [1, 2, 3, 4, 5]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    # A node's whole memory each: four run, and one waits.
    run = sweep.start("--retries", "0", *APART, "--set-resources", "train:mem_mb=16000")
    running = sweep.wait_for("four jobs to run", lambda: len(jobs := sweep.list_jobs()) == 4 and jobs)
    [waiting] = sweep.wait_for("one job to wait", lambda: sweep.list_jobs("PENDING"))
    subprocess.run(["scancel", waiting, *running], check=True)
    assert sweep.wait(run) == 1
    assert sweep.said.count("it was cancelled") == 5
    assert "0 of 5 points done, 5 failed" in sweep.said
    assert sweep.plan()["train"] == 5


@pytest.mark.usefixtures("apart")
def test_the_job_of_a_node_that_dies_runs_again_elsewhere(
    make: Callable[..., SlurmSweep], own_cluster: Cluster
) -> None:
    sweep = make("node_dies", runs=[{"name": "point"}])
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    run = sweep.start("--retries", "1", *APART)
    [job] = sweep.wait_for("the job to run", sweep.list_jobs)
    # Before its program runs, the job has failed by itself.
    sweep.wait_for("its program", lambda: find_program(job))
    node = get_node(job)
    own_cluster.kill_node(node)
    try:
        sweep.hold.unlink()
        assert sweep.wait(run) == 0, sweep.said[-4000:]
        assert "1 of 1 points done" in sweep.said
        # The controller forgets jobs; the accounts have each time that one was queued.
        accounts = ["sacct", "--duplicates", "-X", "--noheader", "--parsable2", "--format=State", f"--jobs={job}"]
        states = subprocess.run(accounts, capture_output=True, text=True).stdout.split()
        assert len(states) > 1, states
        assert states[-1] == "COMPLETED"
        assert sweep.said.count(", as SLURM job ") == 1
    finally:
        own_cluster.revive_node(node)


def slow_down_squeue(sweep: SlurmSweep) -> Path:
    """Have Snakemake wait for each answer of `squeue`, and return the file that is there while it does."""
    folder = sweep.directory / "slow"
    folder.mkdir()
    squeue, asked = folder / "squeue", folder / "asked"
    squeue.write_text(f'#!/bin/sh\ntouch "{asked}"\nsleep 4\nrm "{asked}"\nexec {shutil.which("squeue")} "$@"\n')
    squeue.chmod(0o755)
    sweep.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
    return asked


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.long),  # tests/unit says so of the signal
    ],
)
def test_an_interrupted_run_leaves_nothing_half_made(make: Callable[..., SlurmSweep], number: int) -> None:
    sweep = make("interrupted", variables={"lora_rank": [1, 2]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    asked = slow_down_squeue(sweep) if number == signal.SIGINT else None
    run = sweep.start("--retries", "0", "--jobs", "1")
    sweep.wait_for("a training", lambda: list(sweep.results.glob("trainings/*/state/train/training_log.csv")))
    if asked:  # it comes while Snakemake asks how the jobs are
        sweep.wait_for("no question", lambda: not asked.exists())
        sweep.wait_for("a question", asked.exists)
    run.send_signal(number)
    if number == signal.SIGTERM:
        sweep.hold.unlink()
    assert sweep.wait(run) != 0
    wait_for("the jobs to be gone", lambda: not sweep.list_jobs(ALIVE))
    finished = len(list(sweep.results.glob("trainings/*/adapter/adapter_model.safetensors")))
    # Ctrl-C cancels what runs; SIGTERM lets it finish, and starts no more.
    assert finished == (0 if number == signal.SIGINT else 1)
    assert sweep.plan()["train"] == 2 - finished
    sweep.hold.unlink(missing_ok=True)
    finish(sweep)


class TestControllerKilled:
    def test_a_training_that_still_runs_is_waited_for_and_not_done_twice(self, make: Callable[..., SlurmSweep]) -> None:
        sweep = make("killed", trainer="torchtune", runs=[{"name": "point"}])
        sweep.edit(evaluation=TRAINING_ONLY)
        run = sweep.start("--retries", "0")
        [orphan] = sweep.wait_for("the job to run", sweep.list_jobs)
        # It stands still until the next run has seen it.
        program = sweep.wait_for("its program", lambda: find_program(orphan))
        program.send_signal(signal.SIGSTOP)
        shown = re.compile(r"^\s*train +point(?!.* queued)", re.MULTILINE)
        sweep.wait_for("a training that is no longer queued", lambda: shown.search(sweep.call("status")))
        run.kill()
        run.wait()
        assert orphan in sweep.list_jobs()
        again = sweep.start("--retries", "0", "--set-resources", "train:slurm_extra='--nice=7'")
        sweep.wait_for("what it says", lambda: "still runs: the same training waits for its end" in sweep.said)
        assert "ended before it was done; its lock is removed" in sweep.said
        assert f"SLURM job {orphan} of an earlier run" in sweep.said
        [waiting] = sweep.wait_for("the job that waits", lambda: sweep.list_jobs("PENDING"))
        asked = subprocess.run(["squeue", "--noheader", f"--jobs={waiting}", "--format=%E %y"], **TEXT).stdout
        assert re.fullmatch(rf"afterany:{orphan}\(\w+\) 7\s*", asked), asked
        program.send_signal(signal.SIGCONT)
        assert sweep.wait(again) == 0, sweep.said[-4000:]
        assert sweep.plan() == {}
        log = sweep.find_training_log("point").read_text()
        assert "This recipe was trained by an earlier run" in log

    @pytest.mark.long
    def test_an_evaluation_that_still_runs_is_cancelled_and_done_anew(self, make: Callable[..., SlurmSweep]) -> None:
        sweep = make("killed_evaluation", runs=[{"name": "point"}])
        sweep.edit(evaluation={"baseline": False})
        sweep.hold.touch()
        del sweep.environment["HOLD_TRAINING"]
        sweep.environment["HELD_EVALUATION_OF"] = f"point:{sweep.hold}"
        run = sweep.start("--retries", "0")
        [orphan] = sweep.wait_for(
            "the evaluation to run",
            lambda: [job for job, comment in sweep.list_jobs().items() if "evaluate" in comment],
        )
        assert (sweep.results / ".scratch/merged/point/lorasweep.json").is_file()
        run.kill()
        run.wait()
        del sweep.environment["HELD_EVALUATION_OF"]
        said = finish(sweep)
        assert f"SLURM job {orphan} of an earlier run" in said
        assert "is cancelled" in said
        assert not (sweep.results / ".scratch").exists()


@pytest.mark.long  # tests/unit says so of who holds a sweep
def test_a_second_shell_is_told_who_runs_the_sweep(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("two_shells", runs=[{"name": "point"}])
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    run = sweep.start("--retries", "0")
    sweep.wait_for("the job to run", sweep.list_jobs)
    second = sweep.snakemake("--retries", "0")
    assert second.returncode != 0
    assert f"is being run by {getpass.getuser()}" in second.stderr
    assert f"(process {run.pid}, since" in second.stderr
    sweep.hold.unlink()
    assert sweep.wait(run) == 0, sweep.said[-4000:]
    assert sweep.plan() == {}


@pytest.fixture
def small_disk(cluster: Cluster | None, tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes."""
    # Below the cluster's folder, where its guard finds it.
    folder = Path(tempfile.mkdtemp(prefix="disk-", dir=cluster.dir if cluster else tmp_path))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "lorasweep-test", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize(
    "stage", ["train", *(pytest.param(stage, marks=pytest.mark.long) for stage in ("export", "merge", "evaluate"))]
)
def test_a_full_disk_is_named_and_nothing_cut_short_counts(
    make: Callable[..., SlurmSweep], small_disk: Path, stage: str
) -> None:
    runs = [{"name": "point", "model_format": "hf" if stage == "export" else "adapter"}]
    sweep = make("full", trainer="torchtune" if stage == "train" else "quick_trainer", runs=runs)
    sweep.edit(evaluation=TRAINING_ONLY if stage == "train" else {"baseline": False})
    if stage == "merge":
        sweep.edit(evaluation={"merged_models_in": str(small_disk)})
    if stage != "train":
        sweep.run("--retries", "0", "--until", "take")
    # The folder of what is written moves to the small disk; what is there leaves room for less than the stage writes.
    folder = sweep.results / ("trainings" if stage == "train" else "point")
    if folder.exists():
        shutil.copytree(folder, small_disk / folder.name, dirs_exist_ok=True)
        shutil.rmtree(folder)
    else:
        (small_disk / folder.name).mkdir()
        sweep.results.mkdir(parents=True)
    folder.symlink_to(small_disk / folder.name)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(bytes(max(0, free - (40_000 if stage == "train" else 200_000))))
    done = sweep.snakemake("--retries", "0")
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert f"failed: {stage} of point: the disk is full" in said
    assert sweep.plan()[stage] == 1
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    finish(sweep)


@pytest.mark.long  # TestControllerKilled says so of one whose job still runs
def test_a_rebooted_controller_needs_the_same_command_alone(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("rebooted", runs=[{"name": "point"}])
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    run = sweep.start("--retries", "0")
    sweep.wait_for("the job to run", sweep.list_jobs)
    run.kill()
    run.wait()
    subprocess.run(["scancel", *sweep.list_jobs()], check=True)
    wait_for("the job to be gone", lambda: not sweep.list_jobs(ALIVE))
    sweep.hold.unlink()
    assert list((sweep.directory / ".snakemake/locks").iterdir())
    said = finish(sweep)
    assert "ended before it was done; its lock is removed" in said
