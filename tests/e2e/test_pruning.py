"""Trainings that stop early: what stays is what it would have been, and what stops has what it had."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from lorasweep.util.digest import digest_file
from sweep import Sweep, wait_until

RATES = [1e-5, 1e-3, 2e-3, 4e-3]
POINTS = ["lr=1e-5", "lr=1e-3", "lr=2e-3", "lr=4e-3"]
"""From the worst to the best, after each epoch."""

EPOCHS = 4
HALF = {"after": [1, 2], "keep": 0.5}


def prepare(sweep: Sweep, prune: dict[str, Any] | None = None, **sections: Any) -> Sweep:
    samples = (sweep.directory / "train.jsonl").read_text().splitlines(keepends=True)
    (sweep.directory / "held_out.jsonl").write_text("".join(samples[::3]))
    sweep.edit(controls={"epochs": EPOCHS}, data={"validation": "held_out.jsonl"}, evaluation={"enabled": False})
    sweep.edit(**({"prune": prune} if prune else {}), **sections)
    return sweep


def read_log(adapter: Path, until: int = EPOCHS) -> pd.DataFrame:
    log = pd.read_csv(adapter / "training_log.csv").drop(columns="seconds")
    return log[log["epoch"] <= until]


def read_record(adapter: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((adapter / "lorasweep.json").read_text())
    return record


def get_weights(sweep: Sweep, point: str) -> str:
    return digest_file(sweep.results / point / "adapter/adapter_model.safetensors")


def check_like_plain(pruned: Sweep, plain: Sweep, ends: dict[str, int]) -> None:
    """Check the points of a sweep against those of one without `prune`, which has the adapters of all epochs."""
    for point, end in ends.items():
        earlier = "" if end == EPOCHS else f"__epoch={end}"
        assert get_weights(pruned, point) == get_weights(plain, f"{point}{earlier}")
        adapters = [sweep.results / point / "adapter" for sweep in (pruned, plain)]
        pd.testing.assert_frame_equal(read_log(adapters[0]), read_log(adapters[1], end))
        note = read_record(adapters[0]).get("pruned", {})
        assert (note.get("after"), note.get("epochs")) == ((None, None) if end == EPOCHS else (end, EPOCHS))


@pytest.fixture(scope="module")
def plain(make: Callable[..., Sweep]) -> Sweep:
    """The same sweep without `prune`, with the adapters of all epochs."""
    sweep = prepare(make("plain", variables={"lr": RATES}))
    sweep.edit(evaluation={"epochs": "all"})
    sweep.run("--until", "cleanup")
    return sweep


@pytest.fixture(scope="module")
def half(make: Callable[..., Sweep]) -> Sweep:
    sweep = prepare(make("half", variables={"lr": RATES}), HALF)
    sweep.run()
    return sweep


ENDS = {"lr=1e-5": 1, "lr=1e-3": 1, "lr=2e-3": 2, "lr=4e-3": EPOCHS}


def test_what_stays_is_bit_for_bit_the_training_without_and_what_stops_has_its_rungs_adapter(
    half: Sweep, plain: Sweep
) -> None:
    check_like_plain(half, plain, ENDS)
    assert half.plan() == {}
    for training in (half.results / "trainings").iterdir():
        assert {path.name for path in training.iterdir()} == {"adapter", "recipe.yaml"}


def test_it_is_said_who_stopped_and_what_that_saved(half: Sweep) -> None:
    decisions = [json.loads((half.results / f"prune/after={after}.json").read_text()) for after in (1, 2)]
    staying = [{p for each in d["trainings"].values() if each["stays"] for p in each["points"]} for d in decisions]
    assert staying == [{"lr=2e-3", "lr=4e-3"}, {"lr=4e-3"}]
    table = pd.read_csv(half.results / "results.csv").set_index("point")
    after = table["pruned_after"].dropna().astype(int).to_dict()
    assert after == {point: end for point, end in ENDS.items() if end < EPOCHS}
    assert table["epoch"].to_dict() == ENDS
    assert table["train_seconds"].notna().all()
    ledger = pd.read_csv(half.results / "ledger.csv").set_index("point")
    assert ledger["epochs_saved"].to_dict() == {**{p: EPOCHS - end for p, end in ENDS.items()}, "total": 8}
    assert (ledger["seconds_saved"] > 0).to_dict() == {**{p: end < EPOCHS for p, end in ENDS.items()}, "total": True}
    page = (half.results / "report.html").read_text()
    assert 'id="stopped"' in page
    assert "place 4 of 4, of which 2 go on" in page
    half.call("verify")


def test_a_larger_share_trains_those_that_go_on_now_and_no_others(half: Sweep) -> None:
    sweep = half.copy(Path(f"{half.directory}-larger"))
    sweep.edit(prune={"after": [1, 2], "keep": 0.75})
    plan = sweep.plan()
    assert [plan.get(rule) for rule in ("train_part", "prune", "train", "take")] == [1, 2, 2, 2]


@pytest.mark.long
def test_a_larger_share_ends_as_if_it_had_been_that_large(half: Sweep, plain: Sweep) -> None:
    sweep = half.copy(Path(f"{half.directory}-grown"))
    sweep.edit(prune={"after": [1], "keep": 0.75})
    sweep.run()
    check_like_plain(sweep, plain, {**ENDS, "lr=1e-3": EPOCHS, "lr=2e-3": EPOCHS})
    assert sweep.plan() == {}


def test_a_finished_sweep_trains_nothing_when_prune_is_added(plain: Sweep) -> None:
    sweep = plain.copy(Path(f"{plain.directory}-added"))
    sweep.edit(evaluation={"epochs": "last"}, prune=HALF)
    plan = sweep.plan()
    assert not plan.keys() & {"configure", "train", "train_part", "prune", "take"}


@pytest.mark.parametrize("trainer", ["torchtune", pytest.param("trl", marks=pytest.mark.long)])
def test_a_share_of_one_is_the_plain_sweep_byte_for_byte(
    make: Callable[..., Sweep], plain: Sweep, trainer: str
) -> None:
    rates: dict[str, Any] = {"variables": {"lr": RATES[2:]}}
    if trainer != "torchtune":
        plain = prepare(make("plain-trl", trainer=trainer, **rates))
        plain.run("--until", "cleanup")
    sweep = prepare(make(f"whole-{trainer}", trainer=trainer, **rates), {"after": [1, 3], "keep": 1.0})
    sweep.run("--until", "cleanup")
    check_like_plain(sweep, plain, dict.fromkeys(POINTS[2:], EPOCHS))
    for point in POINTS[2:]:
        records = [read_record(each.results / point / "adapter") for each in (sweep, plain)]
        own, other = ({k: v for k, v in record.items() if k != "recipe_sha256"} for record in records)
        assert own == other


@pytest.mark.long
class TestKilled:
    """A sweep that is killed in a part of a training, and again when a decision is made."""

    @pytest.mark.parametrize("trainer", ["torchtune", "trl"])
    def test_the_same_command_ends_equal(self, make: Callable[..., Sweep], plain: Sweep, trainer: str) -> None:
        if trainer != "torchtune":
            plain = prepare(make("plain-killed", trainer=trainer, variables={"lr": RATES[2:]}))
            plain.edit(evaluation={"epochs": "all"})
            plain.run("--until", "cleanup")
        sweep = make(f"killed-{trainer}", trainer=trainer, variables={"lr": RATES[2:]})
        prepare(sweep, {"after": [1, 2], "keep": 0.5})
        with sweep.start() as run:
            logs = list[Path]()
            wait_until(lambda: logs.extend(sweep.results.glob("trainings/*/state/train/training_log.csv")) or logs)
            for job in psutil.Process(run.pid).children(recursive=True):
                if "python" in job.name() and "train" in job.cmdline():
                    os.kill(job.pid, signal.SIGKILL)
            run.wait()
        with sweep.start() as run:
            wait_until(lambda: run.poll() is not None or (sweep.results / "logs/prune/after=1.log").exists())
        assert not (sweep.results / "lr=4e-3").exists()
        sweep.run()
        check_like_plain(sweep, plain, {"lr=2e-3": 1, "lr=4e-3": EPOCHS})
        assert sweep.plan() == {}


@pytest.mark.long
def test_trainings_go_on_by_their_scores_on_a_task(make: Callable[..., Sweep], plain: Sweep) -> None:
    by = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 12}}
    rates = {"lr": [RATES[0], RATES[3]]}
    sweep = make("by-task", variables=rates)
    prepare(sweep, {"after": [2], "keep": 0.5, "by": by})
    sweep.run()
    decision = json.loads((sweep.results / "prune/after=2.json").read_text())
    scores = {each["points"][0]: each["number"] for each in decision["trainings"].values()}
    if scores["lr=1e-5"] == scores["lr=4e-3"]:  # a tie goes on
        check_like_plain(sweep, plain, {"lr=1e-5": EPOCHS, "lr=4e-3": EPOCHS})
    else:
        better = max(scores, key=scores.__getitem__)
        check_like_plain(sweep, plain, {point: EPOCHS if point == better else 2 for point in scores})
    assert sweep.plan() == {}
    # What went on cannot be scored by the new samples, and keeps its place.
    sweep.edit(prune={"by": {**by, "args": {"size": 11}}})
    assert not sweep.plan().keys() & {"train_part", "prune", "train", "take"}
    # Another share is decided by the scores that are there. After a tie, there is nothing to decide.
    (sweep.results / "logs/prune/after=2.log").unlink()
    sweep.edit(prune={"after": [2], "keep": 1.0, "by": by})
    said = sweep.run()
    log = sweep.results / "logs/prune/after=2.log"
    assert not log.exists() or "Evaluating" not in log.read_text(), said
    check_like_plain(sweep, plain, {"lr=1e-5": EPOCHS, "lr=4e-3": EPOCHS})


@pytest.mark.long
def test_a_setting_that_diverged_stops_and_says_so_without_any_training(make: Callable[..., Sweep]) -> None:
    sweep = make("diverges", variables={"lr": RATES[2:]}, runs=[{"name": "diverges", "lr": 1e30}])
    prepare(sweep, {"after": [1], "keep": 0.5})
    assert sweep.snakemake().returncode == 1
    decision = json.loads((sweep.results / "prune/after=1.json").read_text())
    stays = {point: each["stays"] for each in decision["trainings"].values() for point in each["points"]}
    assert stays == {"lr=2e-3": True, "lr=4e-3": True, "diverges": False}
    assert "the training diverged" in sweep.find_training_log("diverges").read_text()
    assert read_record(sweep.results / "lr=4e-3/adapter")["epochs"] == EPOCHS
    assert not (sweep.find_training("diverges") / "adapter").exists()
    assert not sweep.plan().keys() & {"train_part", "prune"}
