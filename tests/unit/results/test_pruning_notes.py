"""What tables and the report say of trainings that were stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorasweep.experiment.sections import Prune
from lorasweep.results.comparison import read_experiments
from lorasweep.results.pruning import look_back
from lorasweep.results.report import make_report
from lorasweep.util.files import write_record
from made_results import collect, make_results

RATES = [1e-6, 1e-5, 1e-4, 1e-3]
CHANCES = {1e-6: 0.9, 1e-5: 0.3, 1e-4: 0.6, 1e-3: 0.5}
"""The smallest is the best by far, and would win if what was stopped were compared."""

STOPPED = "lr=1e-6"
VARIABLES = ["lr"]
PRUNE = {"after": [1, 2], "keep": 0.75}
PIPELINE = [{"rule": "report", "jobs": 1, "after": []}]


def train(results: Path, point: str, **facts: Any) -> None:
    """Change what a point's manifest says of its training."""
    file = results / point / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["training"] = {key: value for key, value in (manifest["training"] | facts).items() if value is not None}
    file.write_text(json.dumps(manifest))


def stop(results: Path, point: str, after: int = 1) -> None:
    train(results, point, pruned={"after": after, "epochs": 4, "seconds": 5.0}, epochs=after)


def write_losses(results: Path, losses: dict[str, list[float]]) -> None:
    for point, values in losses.items():
        rows = {"step": range(1, len(values) + 1), "epoch": range(1, len(values) + 1), "loss": 1.0}
        log = pd.DataFrame(rows).assign(lr=1e-3, tokens=1, seconds=1.0, validation_loss=values)
        log.to_csv(results / point / "adapter/training_log.csv", index=False)


def write_decision(results: Path, after: int, ranks: dict[str, int], kept: int) -> None:
    trainings = {
        f"{point}-0": {
            "points": [point],
            "epochs": 4,
            "number": rank / 10,
            "stays": rank <= kept,
            "rank": rank,
            "rivals": len(ranks),
            "kept": kept,
            "why": f"validation loss {rank / 10}: place {rank} of {len(ranks)}",
        }
        for point, rank in ranks.items()
    }
    write_record(results / f"prune/after={after}.json", {"after": after, "trainings": trainings})


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    results = tmp_path / "pruned"
    make_results(results, {"lr": RATES}, lambda values: CHANCES[values["lr"]], samples=200)
    experiment = results / "experiment.yaml"
    experiment.write_text(experiment.read_text() + f"prune: {json.dumps(PRUNE)}\n")
    write_decision(results, 1, {"lr=1e-4": 1, "lr=1e-3": 2, "lr=1e-5": 3, "lr=1e-6": 4}, 3)
    write_decision(results, 2, {"lr=1e-3": 1, "lr=1e-5": 2, "lr=1e-4": 3}, 3)
    stop(results, STOPPED)
    collect(results, VARIABLES)
    return results


@pytest.fixture
def page(pruned: Path) -> str:
    make_report(pruned / "results.csv", PIPELINE, pruned / "report.html", pruned / "plots")
    return (pruned / "report.html").read_text()


def test_the_tables_say_after_which_epoch(pruned: Path) -> None:
    table = pd.read_csv(pruned / "results.csv").set_index("point")["pruned_after"]
    assert table.dropna().to_dict() == {STOPPED: 1}
    settings = pd.read_csv(pruned / "replicates.csv").set_index("setting")["pruned_after"]
    assert settings.dropna().to_dict() == {STOPPED: 1}


def test_the_answer_does_not_compare_what_was_stopped(pruned: Path) -> None:
    answer = json.loads((pruned / "answer.json").read_text())
    assert answer["best"] == "lr=1e-4"
    assert answer["p_values"].keys() == {"lr=1e-3", "lr=1e-5"}
    assert STOPPED not in answer["sentence"]
    [caveat] = [caveat for caveat in answer["caveats"] if "prune" in caveat]
    assert caveat.startswith("1 setting was stopped early (prune), and not compared")
    assert not any("smallest" in caveat or "largest" in caveat for caveat in answer["caveats"])


def test_a_value_that_was_stopped_was_tried(tmp_path: Path) -> None:
    """The best of what was finished is no edge if a value beyond it was stopped."""
    results = tmp_path / "edge"
    make_results(results, {"lr": RATES}, lambda values: {**CHANCES, 1e-3: 0.9, 1e-6: 0.1}[values["lr"]], samples=200)
    collect(results, VARIABLES)
    told = json.loads((results / "answer.json").read_text())["caveats"]
    assert any("1e-3, is the largest of 4" in caveat for caveat in told)
    stop(results, "lr=1e-3")
    collect(results, VARIABLES)
    answer = json.loads((results / "answer.json").read_text())
    assert answer["best"] == "lr=1e-4"
    assert not any("is the largest" in caveat for caveat in answer["caveats"])


def test_replicates_that_were_finished_are_apart_from_those_that_were_stopped(tmp_path: Path) -> None:
    results = tmp_path / "seeds"
    make_results(results, {"lr": RATES[:2], "seed": [0, 1]}, lambda values: CHANCES[values["lr"]])
    stop(results, "lr=1e-6__seed=1")
    collect(results, ["lr", "seed"])
    rows = pd.read_csv(results / "replicates.csv")
    own = rows[rows["setting"] == "lr=1e-6"]
    assert dict(zip(own["points"], own["pruned_after"].fillna(0), strict=True)) == {
        "lr=1e-6__seed=0": 0,
        "lr=1e-6__seed=1": 1,
    }
    assert list(own["seeds"]) == [1, 1]


def test_the_report_lists_what_was_stopped_apart(page: str) -> None:
    assert 'id="stopped"' in page
    before, after = page.split('id="stopped"')
    table = after.split("</table>")[0]
    assert f"{STOPPED}/" in table
    assert "validation loss 0.4: place 4 of 4" in table
    assert f"{STOPPED}/" not in before
    assert "stopped early" in before
    assert "lr=1e-4/" not in table


def test_the_report_says_how_near_the_best_was(page: str) -> None:
    assert "by what was compared, the best setting was number 1 of 4 after epoch 1, 3 of 3 after epoch 2." in page
    assert "Whether a setting that was stopped would have become better is not known." in page


def test_experiments_are_compared_without_what_was_stopped(pruned: Path, tmp_path: Path) -> None:
    make_results(tmp_path / "other", {"lr": RATES[1:]}, lambda values: CHANCES[values["lr"]])
    collect(tmp_path / "other", VARIABLES)
    first, second = read_experiments([pruned, tmp_path / "other"])
    assert (
        set(first.settings["setting"])
        == set(second.settings["setting"])
        == {"baseline", "lr=1e-3", "lr=1e-4", "lr=1e-5"}
    )


LOSSES: dict[str, list[float]] = {
    "lr=1e-6": [4, 4, 1, 1],
    "lr=1e-5": [1, 2, 3, 3],
    "lr=1e-4": [2, 1, 2, 2],
    "lr=1e-3": [3, 3, 4, 4],
}


def read_decisions(results: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(results.glob("prune/after=*.json"))]


class TestLookingBack:
    @pytest.fixture
    def results(self, tmp_path: Path) -> Path:
        results = tmp_path / "plain"
        make_results(results, {"lr": RATES}, lambda values: CHANCES[values["lr"]], samples=100)
        for point in LOSSES:
            train(results, point, epochs=4)
        write_losses(results, LOSSES)
        return results

    @pytest.fixture
    def look(self, results: Path) -> Callable[..., list[str]]:
        def look(best: str | None = "lr=1e-6", prune: Any = None) -> list[str]:
            collect(results, VARIABLES)
            table = pd.read_parquet(results / "results.parquet")
            checked = prune and Prune.model_validate(prune)
            return look_back(results, table, best, read_decisions(results), checked, VARIABLES)

        return look

    def test_a_sweep_without_says_when_it_would_have_stopped_the_best(self, look: Callable[..., list[str]]) -> None:
        assert look() == [
            "Looking back: by the validation loss, the best setting was number 4 of 4 after epoch 1, 4 of 4 after "
            "epoch 2, 1 of 4 after epoch 3. Prune with keep: 0.5 and one comparison would have stopped it at 2 of 3 "
            "epochs (1, 2)."
        ]
        assert "would have stopped it at 0 of 3 epochs." in look("lr=1e-4")[0]
        assert look(prune={"after": [1], "keep": 1.0}) == look()

    def test_a_finished_sweep_that_gets_prune_says_so_too_as_nothing_was_stopped(
        self, look: Callable[..., list[str]]
    ) -> None:
        [said] = look(prune={"after": [1, 2], "keep": 0.75})
        assert said.endswith("Prune with keep: 0.75 and one comparison would have stopped it at 2 of 3 epochs (1, 2).")

    def test_a_best_that_was_finished_against_the_rule_is_said_to_be(
        self, results: Path, look: Callable[..., list[str]]
    ) -> None:
        write_decision(results, 1, {"lr=1e-4": 1, "lr=1e-3": 2, "lr=1e-5": 3, "lr=1e-6": 4}, 3)
        said = (
            "Looking back: by what was compared, the best setting was number 4 of 4 after epoch 1. After epoch 1 it "
            "was not among those that go on: it had been trained further before."
        )
        assert look(prune=PRUNE) == [said]
        stop(results, "lr=1e-5")
        unknown = " Whether a setting that was stopped would have become better is not known."
        assert look(prune=PRUNE) == [said + unknown]

    def test_a_border_is_that_of_the_decision(self, results: Path, look: Callable[..., list[str]]) -> None:
        write_decision(results, 1, {"lr=1e-4": 1, "lr=1e-3": 2, "lr=1e-6": 3, "lr=1e-5": 4}, 3)
        stop(results, "lr=1e-5")
        assert "At 1 of 1 comparisons it was the last that went on." in look(prune={**PRUNE, "keep": 0.9})[0]
        assert "the last" not in look("lr=1e-3", prune={**PRUNE, "keep": 0.5})[0]

    def test_losses_are_compared_up_to_where_one_was_stopped(
        self, results: Path, look: Callable[..., list[str]]
    ) -> None:
        stop(results, "lr=1e-5", after=2)
        [said] = look(prune=PRUNE)
        assert "number 4 of 4 after epoch 1, 4 of 4 after epoch 2. Prune" in said
        assert said.endswith("would have become better is not known.")

    def test_a_training_is_one_setting_however_many_of_its_epochs_are_points(
        self, tmp_path: Path, look: Callable[..., list[str]]
    ) -> None:
        results, variables = tmp_path / "epochs", ["epoch", "lr"]
        make_results(results, {"lr": RATES, "epoch": [1, 2, 3, 4]}, lambda values: CHANCES[values["lr"]])
        for epoch in (1, 2, 3, 4):
            for point, losses in LOSSES.items():
                train(results, f"epoch={epoch}__{point}", epochs=epoch, steps=epoch)
                write_losses(results, {f"epoch={epoch}__{point}": losses[:epoch]})
        collect(results, variables)
        table = pd.read_parquet(results / "results.parquet")
        assert look_back(results, table, "epoch=4__lr=1e-6", [], None, variables) == look()
        [said] = look_back(results, table, "epoch=2__lr=1e-6", [], None, variables)
        assert "number 4 of 4 after epoch 1. Prune" in said

    def test_it_says_nothing_of_what_is_not_known(self, look: Callable[..., list[str]]) -> None:
        assert look(None) == []
        assert look("baseline") == []


ADOPTED = {"adopted_from": "elsewhere", "adopted_sha256": "a" * 64}


@pytest.mark.parametrize(
    "record",
    [{"recipe_sha256": None, "steps": None, "epochs": None}, {"pruned": {"after": 1, "epochs": 4, "seconds": 5.0}}],
    ids=["made elsewhere", "of a training that was stopped"],
)
def test_an_existing_adapter_can_be_the_best(tmp_path: Path, record: dict[str, Any]) -> None:
    results = tmp_path / "adopted"
    make_results(results, {"lr": RATES}, lambda values: CHANCES[values["lr"]], samples=200)
    write_losses(results, LOSSES)
    train(results, "lr=1e-6", **ADOPTED, **record)
    (results / "lr=1e-6/adapter/training_log.csv").unlink()
    collect(results, VARIABLES)
    assert json.loads((results / "answer.json").read_text())["best"] == "lr=1e-6"
    assert "pruned_after" not in pd.read_csv(results / "results.csv")
    make_report(results / "results.csv", PIPELINE, results / "report.html", results / "plots")
    page = (results / "report.html").read_text()
    assert "Looking back" not in page
    assert 'id="stopped"' not in page
