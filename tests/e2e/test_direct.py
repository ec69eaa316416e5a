"""Mode B2: one job evaluates many adapters on one loaded base, and each point is on its own all the same."""

import hashlib
import json
import os
import shutil
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from safetensors.numpy import load_file, save, save_file

from sweep import SUMMED_UP, TRAINED_POINTS, Sweep, run_stage, wait_until

POINTS = [f"seed={seed}" for seed in range(TRAINED_POINTS)]

JOBS_OF_ONE = {"publish": 1, "cleanup": 1}


@pytest.fixture
def sweep(trained: Sweep, tmp_path: Path) -> Sweep:
    """Trained points, to be evaluated directly, by one job."""
    return evaluate_directly(trained, tmp_path)


def evaluate_directly(trained: Sweep, directory: Path) -> Sweep:
    sweep = trained.copy(directory)
    sweep.edit(evaluation={"merge_adapters": False, "tasks": ["tasks.py@letters"]})
    return sweep


@pytest.fixture(scope="module")
def evaluated(trained: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three of the points, whose answers differ, evaluated by one job."""
    sweep = evaluate_directly(trained, tmp_path_factory.mktemp("evaluated"))
    sweep.edit(variables={"seed": [0, 1, 2]})
    for point in POINTS[:3]:
        # After so short a training all would answer alike.
        tensors = load_file(sweep.results / point / "adapter/adapter_model.safetensors")
        stronger = {name: 30 * value if "lora_B" in name else value for name, value in tensors.items()}
        write_weights(sweep, point, save(stronger))
    before = list_weights(sweep)
    assert sweep.plan() == {"evaluate_adapters": 1, "publish": 3, "cleanup": 3, **SUMMED_UP}
    sweep.run()
    assert list_weights(sweep) == before
    return sweep


def write_weights(sweep: Sweep, point: str, content: bytes) -> None:
    """Give a point and its training other weights, as if they had been trained."""
    (sweep.results / point / "manifest.json").unlink(missing_ok=True)
    for folder in (sweep.results / point, sweep.find_training(point)):
        weights, record = folder / "adapter/adapter_model.safetensors", folder / "adapter/lorasweep.json"
        weights.unlink()
        weights.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        record.write_text(json.dumps(json.loads(record.read_text()) | {"adapter_sha256": digest}))


def list_weights(sweep: Sweep) -> set[Path]:
    return {file for file in sweep.directory.rglob("*") if file.suffix == ".safetensors"}


def get_times(sweep: Sweep) -> dict[str, int]:
    """When each result that is there was written."""
    logs = sweep.results.glob("*/eval/letters.eval")
    return {log.parent.parent.name: log.stat().st_mtime_ns for log in logs}


def read_id(log: Path) -> str:
    """What tells a log from that of another evaluation."""
    return hashlib.sha256(log.read_bytes()).hexdigest()


def read_answers(*logs: Path) -> list[dict[str, str]]:
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *logs))
    return [read[str(log)]["completions"] for log in logs]


def list_open_samples(sweep: Sweep, point: str) -> set[int] | None:
    """Return the samples of a point that Inspect has begun, and not written down as complete; None before any.

    Of those that are complete some are in its buffer, and some in the log already.
    """
    for file in (sweep.results / point / "state/eval/data").rglob("*.db"):
        try:
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
                rows = [json.loads(data) for (data,) in database.execute("SELECT data FROM samples").fetchall()]
        except sqlite3.OperationalError:  # it is about to be made
            continue
        return {row["id"] for row in rows if not row.get("completed")}
    return None


def test_one_job_loads_the_base_once_and_evaluates_every_adapter(evaluated: Sweep) -> None:
    [log] = (evaluated.results / "logs/evaluate_adapters").iterdir()
    assert log.read_text().count("Loading weights: 100%") == 1
    table = pd.read_csv(evaluated.results / "results.csv").set_index("point")
    assert table["adapter_sha256"].nunique() == 3
    assert (table["probe_distance"] > 0).all()
    assert (table["evaluate_adapters_seconds"] > 0).all()
    assert not list(evaluated.results.glob("*/state"))
    assert not (evaluated.results / ".batches").exists()
    assert evaluated.plan() == {}


@pytest.mark.long  # tests/eval says so of the provider, with hundreds of requests at once
def test_an_adapters_numbers_do_not_depend_on_who_is_in_its_batch(evaluated: Sweep, tmp_path: Path) -> None:
    alone = evaluated.copy(tmp_path)
    for point in POINTS[:3]:
        shutil.rmtree(alone.results / point / "eval")
    alone.edit(variables={"seed": [0, 1]}, evaluation={"adapters_per_job": 1})
    assert alone.plan()["evaluate_adapters"] == 2
    alone.run("--until", "cleanup")
    apart = [alone.results / point / "eval/letters.eval" for point in POINTS[:2]]
    together = [evaluated.results / point / "eval/letters.eval" for point in POINTS[:3]]
    completions = read_answers(*apart, *together)
    assert completions[:2] == completions[2:4]
    assert len({str(answers) for answers in completions}) == 3


@pytest.mark.parametrize(("size", "jobs"), [(1, 4), (3, 2), (4, 1), ("auto", 1)])
def test_the_size_of_a_batch_is_what_the_file_says(sweep: Sweep, size: Any, jobs: int) -> None:
    sweep.edit(evaluation={"adapters_per_job": size})
    assert sweep.plan()["evaluate_adapters"] == jobs


def test_points_that_are_added_are_evaluated_alone(evaluated: Sweep, tmp_path: Path) -> None:
    sweep = evaluated.copy(tmp_path)
    before = get_times(sweep)
    sweep.edit(variables={"seed": [0, 1, 2, 3]})
    assert sweep.plan() == {"evaluate_adapters": 1, **JOBS_OF_ONE, **SUMMED_UP}
    sweep.run("--until", "cleanup")
    assert {point: time for point, time in get_times(sweep).items() if point in before} == before
    assert sweep.plan() == SUMMED_UP


@pytest.mark.long  # test_reruns says so of other modes, tests/unit of a batch
def test_a_corrupt_adapter_and_a_training_that_fails_cost_only_themselves(sweep: Sweep) -> None:
    sweep.edit(variables={"seed": [0, 1, 2]}, runs=[{"name": "diverges", "lr": 1e30}])
    weights = sweep.results / "seed=1/adapter/adapter_model.safetensors"
    content = weights.read_bytes()
    write_weights(sweep, "seed=1", content[:-100])
    # Those that are trained do not wait for the one that is not.
    assert sweep.plan() == {
        "configure": 1,
        "train": 1,
        "take": 1,
        "evaluate_adapters": 2,
        "publish": 4,
        "cleanup": 4,
        **SUMMED_UP,
    }
    done = sweep.snakemake()
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert "trained: 2 of 4 points done, 2 failed, 0 not finished" in said
    assert "failed: publish of seed=1: " in said
    assert "failed: train of diverges: " in said
    assert "adapter_model.safetensors" in (sweep.results / "logs/publish/seed=1.log").read_text()
    finished = get_times(sweep)
    assert set(finished) == {"seed=0", "seed=2"}
    assert sweep.plan() == {"train": 1, "take": 1, "evaluate_adapters": 2, "publish": 2, "cleanup": 2, **SUMMED_UP}
    write_weights(sweep, "seed=1", content)
    sweep.edit(runs=[])
    assert sweep.plan() == {"evaluate_adapters": 1, **JOBS_OF_ONE, **SUMMED_UP}
    sweep.run("--until", "cleanup")
    assert {point: time for point, time in get_times(sweep).items() if point in finished} == finished
    assert sweep.plan() == SUMMED_UP


class TestAJobThatIsKilled:
    """One point was evaluated, of the second's samples so many were, and the third was not begun."""

    SAMPLES = 8

    @pytest.fixture
    def sweep(self, trained: Sweep, tmp_path: Path) -> Sweep:
        # To be gone on with where it lies: Inspect finds the samples it wrote down by the path of their log.
        sweep = evaluate_directly(trained, tmp_path)
        notes = sweep.directory / "notes"
        notes.mkdir()
        sweep.edit(
            variables={"seed": [0, 1, 2]},
            evaluation={"tasks": [{"task": "tasks.py@letters", "args": {"size": 12}}]},
        )
        sweep.environment |= {"NOTE_SAMPLES_IN": str(notes), "WAIT_AFTER_SAMPLES": f"seed=1:{self.SAMPLES}"}
        with sweep.start() as run:
            generated, held = notes / "generated-seed=1", {*range(self.SAMPLES + 1, 13)}

            def has_recorded() -> bool:
                count = len(generated.read_text().split()) if generated.exists() else 0
                return count == self.SAMPLES and list_open_samples(sweep, "seed=1") == held

            wait_until(lambda: run.poll() is not None or has_recorded())
            jobs = psutil.Process(run.pid).children(recursive=True)
            for job in jobs:
                if "python" in job.name() and "evaluate_adapters" in job.cmdline():
                    os.kill(job.pid, signal.SIGKILL)
            assert run.wait() == 1
        assert "0 of 3 points done" in sweep.read_said()
        del sweep.environment["WAIT_AFTER_SAMPLES"]
        return sweep

    @pytest.mark.long  # tests/slurm says so of a batch that is cancelled
    def test_what_it_had_finished_is_kept_and_the_rest_alone_is_done_sample_by_sample(self, sweep: Sweep) -> None:
        begun = {log.parents[2].parent.name: read_id(log) for log in sweep.results.glob("*/state/eval/done/*.eval")}
        assert set(begun) == {"seed=0"}
        sweep.edit(evaluation={"adapters_per_job": 1})
        assert sweep.plan() == {"evaluate_adapters": 3, "publish": 3, "cleanup": 3, **SUMMED_UP}
        sweep.edit(evaluation={"adapters_per_job": 5})
        assert sweep.plan() == {"evaluate_adapters": 1, "publish": 3, "cleanup": 3, **SUMMED_UP}
        sweep.run("--until", "cleanup")
        assert read_id(sweep.results / "seed=0/eval/letters.eval") == begun["seed=0"]
        for point in POINTS[:3]:
            generated = Counter((sweep.directory / f"notes/generated-{point}").read_text().split())
            assert generated == {str(sample): 1 for sample in range(1, 13)}
        [answers] = read_answers(sweep.results / "seed=1/eval/letters.eval")
        assert len(answers) == 12
        assert sweep.plan() == SUMMED_UP

    @pytest.mark.long  # tests/unit says so of what is left of an evaluation
    def test_what_was_begun_is_not_gone_on_with_when_the_evaluation_is_another(self, sweep: Sweep) -> None:
        notes = sweep.directory / "notes/generated-seed=1"
        assert len(notes.read_text().split()) == self.SAMPLES
        notes.unlink()
        sweep.edit(variables={"seed": [1]}, evaluation={"max_tokens": 3})
        sweep.run("--until", "cleanup")
        assert Counter(notes.read_text().split()) == {str(sample): 1 for sample in range(1, 13)}


@pytest.mark.parametrize(
    "modes",
    [
        pytest.param({"merged": {"merge_adapters": True}}, marks=pytest.mark.long),
        pytest.param({"full": {"model_format": "hf"}}, marks=pytest.mark.long),
    ],
    ids=lambda modes: "".join(modes),
)
def test_adapters_that_exist_are_evaluated_without_a_training(sweep: Sweep, modes: dict[str, Any]) -> None:
    """As docs/how-to/direct.md says: a folder of adapters and a base."""
    for point in POINTS[:2]:
        shutil.copytree(sweep.results / point / "adapter", sweep.directory / "adapters" / point)
        (sweep.directory / "adapters" / point / "lorasweep.json").unlink()
    shutil.rmtree(sweep.results)
    del sweep.config["variables"], sweep.config["data"], sweep.config["controls"]
    runs = [{"name": f"direct_{i}", "adapter": f"adapters/{POINTS[i]}"} for i in (0, 1)]
    runs += [{"name": name, "adapter": f"adapters/{POINTS[0]}", **mode} for name, mode in modes.items()]
    sweep.edit(experiment={"name": "given"}, runs=runs)
    of_one = {"export" if "full" in modes else "merge": 1, "evaluate": 1}
    assert sweep.plan() == {
        "adopt": 3,
        "evaluate_adapters": 1,
        "publish": 2,
        **of_one,
        "cleanup": 3,
        **SUMMED_UP,
    }
    sweep.run()
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    rows = table.loc[["direct_0", *modes]]
    assert rows["adapter_sha256"].nunique() == 1
    assert rows["match/accuracy"].nunique() == 1
    assert table["adapter_sha256"].nunique() == 2
    record = json.loads((sweep.results / "direct_0/adapter/lorasweep.json").read_text())
    assert record["adopted_from"] == str(sweep.directory / "adapters/seed=0")
    assert sweep.plan() == {}
    weights = sweep.directory / "adapters/seed=0/adapter_model.safetensors"
    os.utime(weights)
    assert sweep.plan() == {}
    shutil.copy(sweep.directory / "adapters/seed=1/adapter_model.safetensors", weights)
    changed = {"adopt": 2, "evaluate_adapters": 1, "publish": 2, **of_one}
    # Both of a batch are given anew what they have; only one is evaluated.
    assert {rule: count for rule, count in sweep.plan().items() if rule in changed} == changed


@pytest.mark.long  # tests/eval says so of the weights in each precision
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_adapter_gives_the_same_completions_in_every_mode_in_half_precision(sweep: Sweep, dtype: str) -> None:
    adapter = sweep.directory / "adapters/strong"
    shutil.copytree(sweep.results / POINTS[0] / "adapter", adapter)
    (adapter / "lorasweep.json").unlink()
    weights = adapter / "adapter_model.safetensors"
    save_file({n: 30 * value if "lora_B" in n else value for n, value in load_file(weights).items()}, weights)
    shutil.rmtree(sweep.results)
    del sweep.config["variables"], sweep.config["data"], sweep.config["controls"]
    modes = {"A": {"model_format": "hf"}, "B1": {"merge_adapters": True}, "B2": {}}
    runs = [{"name": name, "adapter": "adapters/strong", **mode} for name, mode in modes.items()]
    sweep.edit(experiment={"name": "given"}, model={"dtype": dtype}, runs=runs)
    sweep.run()
    kept, temporary, in_memory = read_answers(*(sweep.results / point / "eval/letters.eval" for point in modes))
    assert kept == temporary == in_memory
    assert all(kept.values())
    table = pd.read_csv(sweep.results / "results.csv").set_index("point").loc[list(modes)]
    assert table["probe_distance"].nunique() == 1
    assert table["probe_distance"].min() > 1
    assert table["adapter_sha256"].nunique() == 1
