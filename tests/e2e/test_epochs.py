"""Checkpoints of earlier epochs: each is kept, evaluated and in the table as what it is, in every mode."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lorasweep.planning.costs import START_SECONDS
from lorasweep.trainers.training_log import read_log
from lorasweep.util.digest import digest_file
from recipes import write_long_answers
from sweep import POINTS, RUN, SUMMED_UP, Sweep, run_stage

EPOCHS = (1, 2)


def get_name(mode: str, epoch: int) -> str:
    return POINTS[mode] if epoch == EPOCHS[-1] else f"{POINTS[mode]}__epoch={epoch}"


# Long, since tests/train says so of the adapters of each epoch.
@pytest.fixture(
    scope="module",
    params=[pytest.param(modes, marks=pytest.mark.long) for modes in (("B1", "B2"), ("A", "B1", "B2"))],
    ids="-".join,
)
def modes(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return tuple(request.param)


@pytest.fixture(scope="module")
def evaluated(make: Callable[..., Sweep], modes: tuple[str, ...]) -> Sweep:
    sweep = make("epochs", variables={"mode": list(modes)})
    task = {"task": "tasks.py@letters", "limit": 3}
    evaluation = {"epochs": "all", "baseline": False, "tasks": [task]}
    sweep.edit(controls={"epochs": EPOCHS[-1]}, evaluation=evaluation)
    assert sweep.plan() == {
        "configure": 1,
        "train": 1,
        "take": 2 * len(modes),
        **({"export": 2} if "A" in modes else {}),
        "merge": 2,
        "evaluate": 4 if "A" in modes else 2,
        "evaluate_adapters": 1,
        "publish": 2,
        "cleanup": 2 * len(modes),
        **SUMMED_UP,
    }
    sweep.run()
    assert sweep.plan() == {}
    return sweep


@pytest.fixture
def sweep(evaluated: Sweep, tmp_path: Path) -> Sweep:
    return evaluated.copy(tmp_path)


@pytest.fixture(scope="module")
def table(evaluated: Sweep) -> pd.DataFrame:
    return pd.read_csv(evaluated.results / "results.csv").set_index("point")


def test_each_epoch_has_a_row_with_its_own_adapter_and_how_far_it_was_trained(
    evaluated: Sweep, table: pd.DataFrame, modes: tuple[str, ...]
) -> None:
    assert len(table) == 2 * len(modes)
    for mode in modes:
        rows = table.loc[[get_name(mode, epoch) for epoch in EPOCHS]]
        assert list(rows["epoch"]) == list(EPOCHS)
        assert list(rows["steps"]) == [5, 10]
        assert rows["tokens"].is_monotonic_increasing
        assert rows["adapter_sha256"].nunique() == rows["probe_distance"].nunique() == 2
        assert len({digest_file(evaluated.directory / recipe) for recipe in rows["recipe"]}) == 1
        for name, row in rows.iterrows():
            log = pd.read_csv(evaluated.results / str(name) / "adapter/training_log.csv")
            assert (log["step"].max(), log["epoch"].max()) == (row["steps"], row["epoch"])
            assert log["loss"].iloc[-1] == row["final_train_loss"]
    assert not any(evaluated.results.glob("*/state"))
    assert not (evaluated.results / ".scratch").exists()


def test_the_modes_agree_at_each_epoch(evaluated: Sweep, table: pd.DataFrame, modes: tuple[str, ...]) -> None:
    files = [evaluated.results / get_name(mode, epoch) / "eval/letters.eval" for mode in modes for epoch in EPOCHS]
    answers = json.loads(run_stage("eval", "e2e/read_logs.py", *files))
    for epoch in EPOCHS:
        names = [get_name(mode, epoch) for mode in modes]
        assert table.loc[names, "adapter_sha256"].nunique() == 1
        said = [answers[str(evaluated.results / name / "eval/letters.eval")]["by_epoch"] for name in names]
        assert all(answers == said[0] for answers in said)


@pytest.mark.long  # tests/train says so of each epoch
def test_the_last_epoch_is_what_a_training_without_checkpoints_gives(evaluated: Sweep, tmp_path: Path) -> None:
    point = evaluated.results / POINTS["B1"]
    adapter = tmp_path / "again/adapter"
    recipe = tmp_path / "again/recipe.yaml"
    recipe.parent.mkdir()
    [training] = (evaluated.results / "trainings").iterdir()
    text = (point / "recipe.yaml").read_text()
    recipe.write_text(text.replace(f"results/epochs/trainings/{training.name}", str(recipe.parent)))
    command = [RUN, "train", "-m", "lorasweep", "job", "train", "--recipe", recipe, "--adapter", adapter]
    subprocess.run(command, cwd=evaluated.directory, check=True)
    weights = "adapter_model.safetensors"
    assert digest_file(adapter / weights) == digest_file(point / "adapter" / weights)
    assert not list(tmp_path.glob("*epoch=*"))


def test_settings_differ_by_epoch_and_the_report_has_a_plot_over_them(evaluated: Sweep, modes: tuple[str, ...]) -> None:
    settings = pd.read_csv(evaluated.results / "replicates.csv")
    assert sorted(settings["epoch"].dropna()) == sorted([*EPOCHS] * len(modes))
    assert settings["setting"].nunique() == 2 * len(modes)
    assert any("epoch" in plot.name for plot in (evaluated.results / "plots").iterdir())


def test_results_are_what_their_manifests_say(evaluated: Sweep) -> None:
    evaluated.call("verify")


def test_fewer_epochs_and_the_same_again_rerun_nothing_but_the_tables_and_a_lost_one_is_taken_again(
    sweep: Sweep, modes: tuple[str, ...]
) -> None:
    sweep.edit(evaluation={"epochs": "last"})
    assert sweep.plan() == SUMMED_UP
    sweep.edit(evaluation={"epochs": [1, 2]})
    assert sweep.plan() == {"report": 1}  # which shows the file
    sweep.edit(evaluation={"epochs": "all"})
    assert sweep.plan() == {}
    (sweep.results / get_name("B1", 1) / "adapter/adapter_model.safetensors").unlink()
    assert sweep.plan() == {"take": 1, "merge": 1, "evaluate": 1, "cleanup": 1, **SUMMED_UP}


def test_a_last_epoch_that_is_not_listed_is_kept_and_not_evaluated(sweep: Sweep, modes: tuple[str, ...]) -> None:
    sweep.edit(evaluation={"epochs": [1]})
    assert sweep.plan() == {"cleanup": len(modes), **SUMMED_UP}
    sweep.run()
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    last = table.loc[[POINTS[mode] for mode in modes]]
    assert last["task"].isna().all()
    assert last["adapter_sha256"].notna().all()
    assert table.loc[[get_name(mode, 1) for mode in modes], "match/accuracy"].notna().all()
    sweep.call("verify")


@pytest.fixture
def varied(make: Callable[..., Sweep]) -> Sweep:
    sweep = make("varied", variables={"epochs": [1, 2, 3]})
    task = {"task": "tasks.py@letters", "limit": 1}
    sweep.edit(evaluation={"epochs": [1, 2], "baseline": False, "merge_adapters": False, "tasks": [task]})
    return sweep


def test_where_epochs_vary_settings_of_train_are_meant_for_the_trainings_of_all(varied: Sweep) -> None:
    plan = varied.plan()
    assert [plan[rule] for rule in ("train", "take", "evaluate_adapters", "publish")] == [3, 6, 1, 5]
    said = varied.run("--dry-run", "--verbose", "--set-resources", "train:runtime=77")
    assert len(re.findall(r"resources: .*runtime=77", said)) == 3


@pytest.mark.long
def test_where_epochs_vary_each_training_keeps_what_it_has(varied: Sweep) -> None:
    varied.run()
    names = {"epochs=1", "epochs=2", "epochs=2__epoch=1", "epochs=3__epoch=1", "epochs=3__epoch=2"}
    scored = pd.read_csv(varied.results / "results.csv").dropna(subset="task").set_index("point")
    assert set(scored.index) == names
    assert scored.loc["epochs=3__epoch=2", "epoch"] == 2
    assert varied.plan() == {}


@pytest.mark.long
class TestBestEpoch:
    """Of each training the best epoch is kept. Both stop early; the less patient one before the other's best epoch."""

    @pytest.fixture(scope="class")
    @classmethod
    def evaluated(cls, make: Callable[..., Sweep]) -> Sweep:
        sweep = make("best", variables={"patience": [1, 2], "mode": ["A", "B2"]})
        write_long_answers(sweep.directory / "held_out.jsonl")
        task = {"task": "tasks.py@letters", "limit": 3}
        evaluation = {"epochs": "best", "baseline": False, "tasks": [task]}
        controls = {"epochs": 8, "lr": 3e-2}
        sweep.edit(
            data={"validation": "held_out.jsonl"}, controls=controls, evaluation=evaluation, plan={"count": True}
        )
        plan = sweep.plan()
        assert [plan[rule] for rule in ("train", "take", "export")] == [2, 4, 2]
        assert "which is an upper bound" in sweep.call("plan")
        sweep.run()
        return sweep

    def test_each_training_has_one_adapter_and_the_table_says_of_which_epoch(self, evaluated: Sweep) -> None:
        table = pd.read_csv(evaluated.results / "results.csv").set_index("point")
        assert sorted(table.index) == [f"mode={m}__patience={p}" for m in ("A", "B2") for p in (1, 2)]
        assert [len(rows) for _, rows in table.groupby(["patience", "adapter_sha256", "probe_distance"])] == [2, 2]
        for name, row in table.iterrows():
            log = read_log(evaluated.results / str(name) / "adapter/training_log.csv")
            losses = {entry.epoch: entry.validation_loss for entry in log if entry.validation_loss is not None}
            best = min(losses, key=losses.__getitem__)
            assert (row["epoch"], row["epochs_trained"]) == (best, best + row["patience"])
            assert (len(losses), log[-1].step) == (row["epochs_trained"], 5 * row["epochs_trained"])
            assert row["epochs_trained"] < 8
            assert (row["steps"], row["final_validation_loss"]) == (5 * best, losses[best])
            manifest = json.loads((evaluated.results / str(name) / "manifest.json").read_text())
            assert manifest["training"]["best_epoch"]["epoch"] == best
        assert "best epoch" in (evaluated.results / "report.html").read_text()
        exported = json.loads((evaluated.results / "mode=A__patience=1/hf_model/lorasweep.json").read_text())
        assert exported["adapter_sha256"] == table.loc["mode=A__patience=1", "adapter_sha256"]

    def test_one_that_stopped_early_is_done_as_large_as_planned_and_its_time_is_of_its_own_epochs(
        self, evaluated: Sweep
    ) -> None:
        assert evaluated.plan() == {}
        evaluated.call("verify")
        ledger = pd.read_csv(evaluated.results / "ledger.csv")
        points = ledger[ledger["point"].str.startswith("mode=")]
        assert list(points["kept_bytes"]) == pytest.approx(list(points["planned_kept_bytes"]), rel=0.1)
        jobs = pd.read_csv(evaluated.results / "jobs.csv").query("rule == 'train'").set_index("name")
        table = pd.read_csv(evaluated.results / "results.csv").set_index("point")
        planned = jobs["planned_seconds"]
        assert planned.nunique() == 1
        # Of a load and eight epochs, what was not trained is left out; the load is paid whole.
        assert jobs["modelled_seconds"].min() > START_SECONDS
        saved = (planned - jobs["modelled_seconds"]) / (8 - table.loc[jobs.index, "epochs_trained"])
        assert list(saved) == pytest.approx([saved.mean()] * 2, abs=1e-3)
        assert saved.min() > 0

    def test_other_epochs_are_another_training(self, evaluated: Sweep) -> None:
        sweep = evaluated.copy(Path(str(evaluated.directory) + "-changed"))
        sweep.edit(variables={"mode": ["A", "B2"]}, evaluation={"epochs": "last"})
        plan = sweep.plan()
        assert [plan.get(rule) for rule in ("train", "take", "export", "evaluate")] == [1, 2, 1, 1]
