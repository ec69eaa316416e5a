"""Mode B2: one job evaluates many adapters on one loaded base, and each point is on its own all the same."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file

from sweep import ROOT, SUMMED_UP, Sweep, run_stage

POINTS = [f"seed={seed}" for seed in range(5)]


@pytest.fixture
def sweep(trained: Sweep, tmp_path: Path) -> Iterator[Sweep]:
    """Five trained points, to be evaluated directly, by one job."""
    sweep = trained.copy(tmp_path)
    sweep.edit(variables={"seed": list(range(5))}, evaluation={"merge_adapters": False, "tasks": ["tasks.py@letters"]})
    yield sweep
    subprocess.run(["pkill", "-KILL", "-f", str(sweep.directory)], check=False)


def get_times(sweep: Sweep) -> dict[str, int]:
    """When each result that is there was written."""
    logs = sweep.results.glob("*/eval/letters.eval")
    return {log.parent.parent.name: log.stat().st_mtime_ns for log in logs}


def read_id(log: Path) -> str:
    """What tells a log from that of another evaluation."""
    return hashlib.sha256(log.read_bytes()).hexdigest()


def wait_until(condition: Callable[[], Any], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def kill_evaluation(sweep: Sweep, when: Callable[[], Any]) -> str:
    """Run, and when something is the case, kill the process that evaluates; return what Snakemake said at its end."""
    run = subprocess.Popen(
        sweep.command("--cores", "2"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **sweep.environment},
    )
    wait_until(when)
    find = ["pgrep", "-f", f"python.*evaluate_adapters.py.*{sweep.results.name}/"]
    jobs = subprocess.run(find, capture_output=True, text=True, check=True).stdout.split()
    for job in jobs:
        os.kill(int(job), signal.SIGKILL)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 1
    return said


def test_one_job_loads_the_base_once_and_evaluates_every_adapter(sweep: Sweep) -> None:
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 5, "cleanup": 5, **SUMMED_UP}
    written_before = {file for file in sweep.directory.rglob("*") if file.suffix == ".safetensors"}
    sweep.run()
    assert {file for file in sweep.directory.rglob("*") if file.suffix == ".safetensors"} == written_before
    [log] = (sweep.results / "logs/evaluate_adapters").iterdir()
    assert log.read_text().count("Loading weights: 100%") == 1
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    assert table["adapter_sha256"].nunique() == 5
    assert (table["probe_distance"] > 0).all()
    assert (table["evaluate_adapters_seconds"] > 0).all()
    assert not list(sweep.results.glob("*/state"))
    assert not (sweep.results / ".batches").exists()
    assert sweep.plan() == {}


def test_an_adapters_numbers_do_not_depend_on_who_is_in_its_batch(sweep: Sweep, tmp_path_factory: Any) -> None:
    sweep.edit(variables={"seed": [0, 1, 2]})
    for point in POINTS[:3]:
        weights = sweep.results / point / "adapter/adapter_model.safetensors"
        tensors = load_file(weights)  # after so short a training all would answer alike
        save_file({name: 30 * value if "lora_B" in name else value for name, value in tensors.items()}, weights)
    alone = sweep.copy(tmp_path_factory.mktemp("alone"))
    alone.edit(evaluation={"adapters_per_job": 1})
    assert alone.plan()["evaluate_adapters"] == 3
    sweep.run()
    alone.run()
    files = [folder.results / point / "eval/letters.eval" for folder in (sweep, alone) for point in POINTS[:3]]
    logs = list(json.loads(run_stage("eval", "e2e/read_logs.py", *files)).values())
    completions = [log["completions"] for log in logs]
    assert completions[:3] == completions[3:]
    assert len({str(answers) for answers in completions}) == 3


@pytest.mark.parametrize(("size", "jobs"), [(1, 5), (2, 3), (5, 1), ("auto", 1)])
def test_the_size_of_a_batch_is_what_the_file_says(sweep: Sweep, size: Any, jobs: int) -> None:
    sweep.edit(evaluation={"adapters_per_job": size})
    assert sweep.plan()["evaluate_adapters"] == jobs


def test_a_corrupt_adapter_costs_only_itself(sweep: Sweep) -> None:
    weights = sweep.results / "seed=2/adapter/adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    done = sweep.snakemake()
    assert done.returncode == 1
    assert "trained: 4 of 5 points done, 1 failed, 0 not finished" in done.stdout + done.stderr
    assert "failed: publish of seed=2: " in done.stdout + done.stderr
    assert "adapter_model.safetensors" in (sweep.results / "logs/publish/seed=2.log").read_text()
    finished = get_times(sweep)
    assert set(finished) == {*POINTS} - {"seed=2"}
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 1, "cleanup": 1, **SUMMED_UP}
    weights.write_bytes(content)
    sweep.run()
    assert {point: time for point, time in get_times(sweep).items() if point in finished} == finished
    assert sweep.plan() == {}


def test_what_a_killed_job_had_finished_is_kept_and_the_rest_alone_is_done(sweep: Sweep) -> None:
    sweep.environment["SLOW_EVALUATION_OF"] = "seed=2:600"
    said = kill_evaluation(sweep, when=lambda: (sweep.results / "seed=1/state/eval/done/metrics.json").is_file())
    assert "0 of 5 points done" in said
    begun = {log.parents[2].parent.name: read_id(log) for log in sweep.results.glob("*/state/eval/done/letters.eval")}
    assert set(begun) == {"seed=0", "seed=1"}
    sweep.environment.clear()
    sweep.edit(evaluation={"adapters_per_job": 1})
    assert sweep.plan() == {"evaluate_adapters": 5, "publish": 5, "cleanup": 5, **SUMMED_UP}
    sweep.edit(evaluation={"adapters_per_job": 5})
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 5, "cleanup": 5, **SUMMED_UP}
    sweep.run()
    assert {point: read_id(sweep.results / point / "eval/letters.eval") for point in begun} == begun
    assert len(pd.read_csv(sweep.results / "results.csv")) == 5
    assert sweep.plan() == {}


def test_an_evaluation_that_was_killed_goes_on_with_the_samples_that_are_left(
    sweep: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> None:
    notes = tmp_path_factory.mktemp("notes")
    sweep.edit(variables={"seed": [0]})
    sweep.edit(evaluation={"tasks": [{"task": "tasks.py@letters", "args": {"size": 12}}]})
    sweep.environment |= {"NOTE_SAMPLES_IN": str(notes), "WAIT_AFTER_SAMPLES": "8:600"}

    def eight_are_done() -> bool:
        file = notes / "generated-seed=0"
        return file.is_file() and len(file.read_text().split()) == 8 and time.time() - file.stat().st_mtime > 5

    kill_evaluation(sweep, when=eight_are_done)
    del sweep.environment["WAIT_AFTER_SAMPLES"]
    sweep.run()
    generated = Counter((notes / "generated-seed=0").read_text().split())
    assert generated == {str(sample): 1 for sample in range(1, 13)}
    log = sweep.results / "seed=0/eval/letters.eval"
    read = json.loads(run_stage("eval", "e2e/read_logs.py", log))[str(log)]
    assert len(read["completions"]) == 12
    assert pd.read_csv(sweep.results / "results.csv")["samples"].tolist() == [12]


def test_what_was_begun_is_not_gone_on_with_when_the_evaluation_is_another(
    sweep: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> None:
    notes = tmp_path_factory.mktemp("notes")
    sweep.edit(variables={"seed": [0]})
    sweep.environment |= {"NOTE_SAMPLES_IN": str(notes), "WAIT_AFTER_SAMPLES": "3:600"}
    file = notes / "generated-seed=0"
    kill_evaluation(sweep, when=lambda: file.is_file() and len(file.read_text().split()) == 3)
    del sweep.environment["WAIT_AFTER_SAMPLES"]
    file.unlink()
    sweep.edit(evaluation={"max_tokens": 3})
    sweep.run()
    assert Counter(file.read_text().split()) == {str(sample): 1 for sample in range(1, 7)}


def test_points_that_are_added_are_evaluated_alone(sweep: Sweep) -> None:
    sweep.edit(variables={"seed": [0, 3]})
    sweep.run()
    before = get_times(sweep)
    sweep.edit(variables={"seed": [0, 1, 2, 3, 4]})
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 3, "cleanup": 3, **SUMMED_UP}
    sweep.run()
    assert {point: time for point, time in get_times(sweep).items() if point in before} == before
    assert sweep.plan() == {}


def test_trained_points_do_not_wait_for_one_whose_training_failed_before(sweep: Sweep) -> None:
    sweep.edit(runs=[{"name": "diverges", "lr": 1e30}], evaluation={"adapters_per_job": 6})
    assert sweep.plan() == {
        "configure": 1,
        "train": 1,
        "evaluate_adapters": 2,
        "publish": 6,
        "cleanup": 6,
        **SUMMED_UP,
    }
    done = sweep.snakemake()
    assert done.returncode == 1
    assert "5 of 6 points done, 1 failed, 0 not finished" in done.stdout + done.stderr
    assert sweep.plan() == {"train": 1, "evaluate_adapters": 1, "publish": 1, "cleanup": 1, **SUMMED_UP}


def test_adapters_that_exist_are_evaluated_without_a_training(sweep: Sweep, tmp_path: Path) -> None:
    """As docs/direct.md says: a folder of adapters and a base."""
    for point in POINTS[:2]:
        shutil.copytree(sweep.results / point / "adapter", sweep.directory / "adapters" / point)
        (sweep.directory / "adapters" / point / "lorasweep.json").unlink()
    shutil.rmtree(sweep.results)
    del sweep.config["variables"], sweep.config["data"], sweep.config["controls"]
    modes = [("direct", {}), ("merged", {"merge_adapters": True}), ("full", {"model_format": "hf"})]
    runs = [{"name": f"{name}_{i}", "adapter": f"adapters/{POINTS[i]}", **mode} for name, mode in modes for i in (0, 1)]
    sweep.edit(experiment={"name": "given"}, runs=runs, evaluation={"baseline": True})
    assert sweep.plan() == {
        "adopt": 6,
        "evaluate_adapters": 1,
        "publish": 2,
        "evaluate_merged": 2,
        "merge": 2,
        "evaluate": 3,
        "cleanup": 7,
        **SUMMED_UP,
    }
    sweep.run()
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    for i in (0, 1):
        rows = table.loc[[f"{name}_{i}" for name, _ in modes]]
        assert rows["adapter_sha256"].nunique() == 1
        assert rows["match/accuracy"].nunique() == 1
    record = json.loads((sweep.results / "direct_0/adapter/lorasweep.json").read_text())
    assert record["adopted_from"] == str(sweep.directory / "adapters/seed=0")
    assert sweep.plan() == {}
    weights = sweep.directory / "adapters/seed=0/adapter_model.safetensors"
    os.utime(weights)
    assert sweep.plan() == {}
    shutil.copy(sweep.directory / "adapters/seed=1/adapter_model.safetensors", weights)
    changed = {"adopt": 3, "evaluate_adapters": 1, "publish": 2, "evaluate_merged": 1, "merge": 1, "evaluate": 1}
    # Both of a batch are given anew what they have; only one is evaluated.
    assert {rule: count for rule, count in sweep.plan().items() if rule in changed} == changed
