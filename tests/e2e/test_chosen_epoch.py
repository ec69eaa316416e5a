"""The epoch that a validation task chooses: its adapter is kept and evaluated, and all others are deleted."""

import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from lorasweep.util.digest import digest_file
from sweep import SUMMED_UP, Sweep, wait_until

DEV = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 12}}
EPOCHS = 6


def edit(sweep: Sweep, epochs: int, dev: dict[str, Any], **evaluation: Any) -> None:
    chosen = {"epochs": "best", "validation_task": dev, "baseline": False}
    tasks = {"tasks": [{"task": "tasks.py@letters", "limit": 3}]}
    sweep.edit(controls={"epochs": epochs, "batch_size": 1}, evaluation={**chosen, **tasks, **evaluation})


def read_choice(adapter: Path) -> dict[str, Any]:
    chosen: dict[str, Any] = json.loads((adapter / "lorasweep.json").read_text())["best_epoch"]
    return chosen


@pytest.fixture(scope="module")
def chosen(make: Callable[..., Sweep]) -> Sweep:
    sweep = make("chosen", variables={"mode": ["A", "B2"]})
    edit(sweep, EPOCHS, DEV)
    sweep.edit(plan={"count": True})
    assert sweep.plan() == {
        "configure": 1,
        "train": 1,
        "choose_epoch": 1,
        "take": 2,
        "export": 1,
        "evaluate": 1,
        "evaluate_adapters": 1,
        "publish": 1,
        "cleanup": 2,
        **SUMMED_UP,
    }
    said = sweep.run()
    assert "evaluation.validation_task: shares the inputs of 3 samples with the task 'letters'" in said
    return sweep


def test_the_earliest_epoch_with_the_best_score_is_kept_and_the_others_are_deleted(chosen: Sweep) -> None:
    [training] = (chosen.results / "trainings").iterdir()
    assert {path.name for path in training.iterdir()} == {"adapter", "recipe.yaml"}
    choice = read_choice(training / "adapter")
    scores = {entry["epoch"]: entry["score"] for entry in choice["scores"]}
    assert list(scores) == list(range(1, EPOCHS + 1))
    assert len({entry["adapter_sha256"] for entry in choice["scores"]}) == EPOCHS
    best = max(scores, key=scores.__getitem__)
    assert (choice["epoch"], choice["score"], choice["metric"]) == (best, scores[best], "match/accuracy")
    assert 1 < best < EPOCHS
    assert scores[1] < scores[best]
    weights = digest_file(training / "adapter/adapter_model.safetensors")
    assert weights == choice["scores"][best - 1]["adapter_sha256"]


def test_each_point_says_of_which_epoch_it_is(chosen: Sweep) -> None:
    table = pd.read_csv(chosen.results / "results.csv").set_index("point")
    assert table["adapter_sha256"].nunique() == 1
    for name, row in table.iterrows():
        choice = read_choice(chosen.results / str(name) / "adapter")
        assert (row["epoch"], row["epochs_trained"]) == (choice["epoch"], EPOCHS)
        assert (row["validation_score"], row["validation_stderr"]) == (choice["score"], choice["standard_error"])
        assert row["steps"] == 25 * row["epoch"]
        log = pd.read_csv(chosen.results / str(name) / "adapter/training_log.csv")
        assert log["epoch"].max() == EPOCHS
        manifest = json.loads((chosen.results / str(name) / "manifest.json").read_text())
        assert manifest["training"]["best_epoch"] == choice
    assert list(table["choose_epoch_seconds"].notna()) == list(table["train_seconds"].notna()) == [True, False]
    page = (chosen.results / "report.html").read_text()
    assert "best epoch" in page
    assert "validation score" in page


def test_its_jobs_are_as_large_as_planned(chosen: Sweep) -> None:
    chosen.call("verify")
    ledger = pd.read_csv(chosen.results / "ledger.csv")
    points = ledger[ledger["point"].str.startswith("mode=")]
    assert list(points["kept_bytes"]) == pytest.approx(list(points["planned_kept_bytes"]), rel=0.1)
    jobs = pd.read_csv(chosen.results / "jobs.csv").set_index("rule")
    assert jobs.loc["choose_epoch", "modelled_seconds"] > 0


def test_only_what_the_choice_depends_on_trains_again(chosen: Sweep) -> None:
    sweep = chosen.copy(Path(f"{chosen.directory}-changed"))
    assert sweep.plan() == {}
    edit(sweep, EPOCHS, DEV, tasks=[{"task": "tasks.py@letters", "limit": 2}])
    assert sweep.plan() == {"evaluate": 1, "evaluate_adapters": 1, "publish": 1, "cleanup": 2, **SUMMED_UP}
    for dev in ({**DEV, "limit": 5}, {**DEV, "higher_is_better": False}):
        edit(sweep, EPOCHS, dev)
        plan = sweep.plan()
        assert [plan.get(rule) for rule in ("train", "choose_epoch", "take", "export")] == [1, 1, 2, 1]
    edit(sweep, EPOCHS, DEV)
    assert sweep.plan() == {}
    shutil.rmtree(sweep.results / "mode=B2/adapter")
    plan = sweep.plan()
    assert [plan.get(rule) for rule in ("train", "choose_epoch", "take")] == [None, None, 1]


@pytest.mark.long
def test_the_scores_are_those_of_points_of_all_epochs(chosen: Sweep) -> None:
    choice = read_choice(chosen.results / "mode=B2/adapter")
    sweep = chosen.copy(Path(f"{chosen.directory}-all"))
    del sweep.config["evaluation"]["validation_task"]
    sweep.edit(variables={"mode": ["B2"]}, evaluation={"epochs": "all", "tasks": [DEV]})
    sweep.run()
    table = pd.read_csv(sweep.results / "results.csv").sort_values("epoch")
    found = [(entry["epoch"], entry["score"], entry["adapter_sha256"]) for entry in choice["scores"]]
    assert found == list(zip(table["epoch"], table["match/accuracy"], table["adapter_sha256"], strict=True))


@pytest.mark.long
class TestKilled:
    """A choice that was killed in its second epoch. It is that of the trainer `trl`."""

    @pytest.fixture(scope="class")
    @classmethod
    def killed(cls, make: Callable[..., Sweep]) -> Sweep:
        sweep = make("killed", variables={"mode": ["B2"]}, trainer="trl")
        edit(sweep, 2, DEV)
        notes = sweep.directory / "notes"
        notes.mkdir()
        sweep.environment |= {"NOTE_SAMPLES_IN": str(notes), "WAIT_AFTER_SAMPLES": "epoch=2:4"}
        generated = notes / "generated-epoch=2"
        with sweep.start() as run:
            wait_until(lambda: run.poll() is not None or generated.exists())
            for job in psutil.Process(run.pid).children(recursive=True):
                if "python" in job.name() and "choose_epoch" in job.cmdline():
                    os.kill(job.pid, signal.SIGKILL)
            assert run.wait() == 1
        assert "0 of 1 points done" in sweep.read_said()
        del sweep.environment["WAIT_AFTER_SAMPLES"]
        return sweep

    @pytest.fixture
    def sweep(self, killed: Sweep, tmp_path: Path) -> Sweep:
        sweep = killed.copy(tmp_path)
        sweep.environment["NOTE_SAMPLES_IN"] = str(sweep.directory / "notes")
        return sweep

    def finish(self, sweep: Sweep) -> None:
        """Finish the sweep. What was scored is not scored again, and the state of the choice is removed."""
        sweep.run()
        generated = Counter((sweep.directory / "notes/generated-epoch=1").read_text().split())
        assert generated == {str(sample): 1 for sample in range(1, 13)}
        [training] = (sweep.results / "trainings").iterdir()
        assert {path.name for path in training.iterdir()} == {"adapter", "recipe.yaml"}
        assert len(read_choice(sweep.results / "mode=B2/adapter")["scores"]) == 2
        assert sweep.plan() == {}

    def test_it_goes_on_where_it_was(self, sweep: Sweep) -> None:
        plan = sweep.plan()
        assert [plan.get(rule) for rule in ("configure", "train", "choose_epoch", "take")] == [None, None, 1, 1]
        self.finish(sweep)

    @pytest.mark.long
    def test_a_choice_that_was_killed_while_it_deleted_epochs_is_made_without_training(self, sweep: Sweep) -> None:
        [training] = (sweep.results / "trainings").iterdir()
        shutil.rmtree(training / "epoch=last")
        assert sweep.plan()["train"] == 1
        self.finish(sweep)
        assert "This recipe was trained by an earlier run" in sweep.find_training_log("training").read_text()

    def test_an_epoch_that_is_gone_is_trained_again(self, sweep: Sweep) -> None:
        [training] = (sweep.results / "trainings").iterdir()
        (training / "epoch=1/adapter_model.safetensors").unlink()
        said = sweep.run("--dry-run")
        assert "train: epoch=1/adapter_model.safetensors is missing" in said
        assert sweep.plan()["train"] == sweep.plan()["choose_epoch"] == 1
