"""The race of a sweep's trainings: what is decided by what is on disk, and what jobs of ended trainings request."""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pytest

from lorasweep.cli.job import train as job
from lorasweep.layout import get_decision_file, get_part_file, get_part_name, get_rung_folder, split_part_name
from lorasweep.running.outdated import find_outdated
from lorasweep.sweep.pruning import Race, find_end
from lorasweep.sweep.sweep import Sweep
from lorasweep.trainers import Diverged
from lorasweep.trainers.rungs import describe_part, publish_stopped
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError, JobError
from lorasweep.util.files import write_record
from plain_checkpoint import write_checkpoint

LOG = "step,epoch,loss,lr,tokens,seconds,validation_loss\n"
RATES = {"lr=1e-3": 0.1, "lr=1e-4": 0.2, "lr=1e-5": 0.3, "lr=1e-6": 0.4}
"""The validation loss of each point."""

TASKS = "@task\ndef letters(size=3):\n    pass\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    samples = [{"input": f"after {a}", "output": b} for a, b in pairwise(ascii_lowercase)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (tmp_path / "held_out.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    (tmp_path / "tasks.py").write_text(TASKS)

    def load(is_job: bool = False, **sections: Any) -> Sweep:
        config = {
            "experiment": {"name": "mine"},
            "model": {"path": "model", "device": "cuda"},
            "data": {"train": "train.jsonl", "validation": "held_out.jsonl"},
            "variables": {"lr": [1e-3, 1e-4, 1e-5, 1e-6]},
            "controls": {"epochs": 4},
            "prune": {"after": [1, 2]},
            **sections,
        }
        config["evaluation"] = {"tasks": ["tasks.py@letters"], **sections.get("evaluation", {})}
        return Sweep.load({key: value for key, value in config.items() if value}, "mine.yaml", is_job=is_job)

    return load


def write_adapter(folder: Path, recipe: Path, epochs: int, loss: float) -> None:
    """Write what a training leaves of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(f"{recipe.parent.name} {epochs}")
    (folder / "adapter_config.json").write_text("{}")
    rows = [f"{epoch},{epoch},1,1e-3,10,{3.0 * epoch},{loss}\n" for epoch in range(1, epochs + 1)]
    (folder / "training_log.csv").write_text(LOG + "".join(rows))
    record = {
        "epochs": epochs,
        "recipe_sha256": digest_file(recipe),
        "adapter_sha256": digest_file(folder / "adapter_model.safetensors"),
    }
    write_record(folder / "lorasweep.json", record)


def train_parts(sweep: Sweep, after: int, losses: Mapping[str, float] = RATES, *, without: str = "") -> None:
    """Leave what parts of trainings leave."""
    for training, point in sweep.trainings.items():
        folder = sweep.results / "trainings" / training
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(sweep.get_recipe(training))
        if point != without and point in losses:
            adapter = get_rung_folder(folder, after)
            write_adapter(adapter, folder / "recipe.yaml", after, losses[point])
            write_record(get_part_file(sweep.results, training, after), describe_part(adapter, after))


def get_race(sweep: Sweep) -> Race:
    assert sweep.race
    return sweep.race


def list_staying(sweep: Sweep, after: int) -> set[str] | None:
    decision = get_race(sweep).decide()[after]
    trainings = decision["trainings"].items() if decision else []
    return {sweep.trainings[name] for name, verdict in trainings if verdict["stays"]} if decision else None


def name_training(sweep: Sweep, point: str) -> str:
    return str(sweep.points[point].training)


def test_a_decision_waits_for_all_numbers_and_is_what_the_job_writes(load: Callable[..., Sweep]) -> None:
    sweep = load()
    train_parts(sweep, 1, without="lr=1e-6")
    race = get_race(sweep)
    assert race.decide() == {1: None, 2: None}
    assert [sweep.trainings[each.training] for each in race.list_missing(1)] == ["lr=1e-6"]
    race.record()
    with pytest.raises(JobError, match=rf"^no number of {name_training(sweep, 'lr=1e-6')} after epoch 1 yet$"):
        Race.read(sweep.results).write_decision(1)
    assert not get_decision_file(sweep.results, 1).exists()
    train_parts(sweep, 1)
    assert list_staying(sweep, 1) == {"lr=1e-3", "lr=1e-4"}
    Race.read(sweep.results).write_decision(1)
    written = json.loads(get_decision_file(sweep.results, 1).read_text())
    assert written == get_race(sweep).decide()[1]
    verdict = written["trainings"][name_training(sweep, "lr=1e-5")]
    assert (verdict["number"], verdict["rank"], verdict["rivals"], verdict["kept"]) == (0.3, 3, 4, 2)
    assert verdict["why"] == "validation loss 0.300: place 3 of 4, of which 2 go on"
    assert (written["keep"], written["by"], written["after"]) == (0.5, "validation_loss", 1)


def test_who_is_out_is_not_asked_again(load: Callable[..., Sweep]) -> None:
    sweep = load()
    train_parts(sweep, 1)
    missing = get_race(sweep).list_missing(2)
    assert {sweep.trainings[each.training] for each in missing} == {"lr=1e-3", "lr=1e-4"}
    train_parts(sweep, 2, {"lr=1e-3": 0.9, "lr=1e-4": 0.2})
    decisions = get_race(sweep).decide()
    ends = {point: find_end(decisions, training) for training, point in sweep.trainings.items()}
    assert ends == {"lr=1e-3": (2, True), "lr=1e-4": (None, True), "lr=1e-5": (1, True), "lr=1e-6": (1, True)}


def test_a_number_that_is_missing_of_an_earlier_epoch_is_named(load: Callable[..., Sweep]) -> None:
    sweep = load()
    train_parts(sweep, 1, without="lr=1e-6")
    train_parts(sweep, 2, {"lr=1e-3": 0.1, "lr=1e-4": 0.2, "lr=1e-5": 0.3})
    missing = name_training(sweep, "lr=1e-6")
    with pytest.raises(JobError, match=rf"^no number of {missing} after epoch 1 yet$"):
        get_race(sweep).write_decision(2)
    train_parts(sweep, 1)
    # Those that were stopped after epoch 1 are not named.
    get_part_file(sweep.results, name_training(sweep, "lr=1e-4"), 2).unlink()
    shutil.rmtree(sweep.results / "trainings" / name_training(sweep, "lr=1e-4") / "rungs")
    with pytest.raises(JobError, match=rf"^no number of {name_training(sweep, 'lr=1e-4')} after epoch 2 yet$"):
        get_race(load()).write_decision(2)


def test_an_epoch_that_is_added_before_needs_no_training_of_what_has_gone_further(load: Callable[..., Sweep]) -> None:
    train_parts(load(prune={"after": [2]}), 2)
    sweep = load(prune={"after": [1, 2]})
    assert get_race(sweep).list_missing(1) == []
    assert list_staying(sweep, 1) == {"lr=1e-3", "lr=1e-4"}


def test_what_was_finished_before_competes_by_its_log_and_is_not_trained(load: Callable[..., Sweep]) -> None:
    sweep = load()
    train_parts(sweep, 1, {})
    for training, point in sweep.trainings.items():
        folder = sweep.results / "trainings" / training
        write_adapter(folder / "adapter", folder / "recipe.yaml", 4, RATES[point])
    assert list_staying(sweep, 1) == {"lr=1e-3", "lr=1e-4"}
    assert get_race(sweep).list_missing(2) == []
    assert sweep.get_rung_parts("after=2") == []
    added = load(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]})
    assert [each.points for each in get_race(added).list_missing(1)] == [("lr=1e-7",)]


def test_a_training_that_diverged_is_known_as_long_as_its_note_is_there(load: Callable[..., Sweep]) -> None:
    sweep = load()
    train_parts(sweep, 1, without="lr=1e-3")
    training = name_training(sweep, "lr=1e-3")
    write_record(get_part_file(sweep.results, training, 1), {"after": 1, "diverged": "the loss is nan"})
    assert list_staying(sweep, 1) is None
    note_divergence(sweep, training)
    assert list_staying(sweep, 1) == {"lr=1e-4", "lr=1e-5"}
    decision = get_race(sweep).decide()[1]
    assert decision
    assert decision["trainings"][training]["why"] == "it diverged: place 4 of 4, of which 2 go on"
    # By newer packages it was trained to the end, which removes the note.
    folder = sweep.results / "trainings" / training
    shutil.rmtree(folder / "state")
    write_adapter(folder / "adapter", folder / "recipe.yaml", 4, 0.1)
    assert list_staying(load(), 1) == {"lr=1e-3", "lr=1e-4"}


def note_divergence(sweep: Sweep, training: str) -> None:
    note = sweep.results / "trainings" / training / "state/train.diverged.json"
    write_record(note, {"key": "of other versions", "message": "the training diverged: the loss is nan"})


def test_a_training_that_was_stopped_has_no_number_if_it_goes_on_now(load: Callable[..., Sweep]) -> None:
    sweep = load(prune={"after": [1, 2], "keep": 0.75})
    train_parts(sweep, 1)
    train_parts(sweep, 2, {"lr=1e-3": 0.1, "lr=1e-4": 0.2})
    part = get_part_file(sweep.results, name_training(sweep, "lr=1e-5"), 2)
    write_record(part, {"after": 2, "stopped": 1})
    assert list_staying(sweep, 1) == {"lr=1e-3", "lr=1e-4", "lr=1e-5"}
    assert [each.points for each in get_race(sweep).list_missing(2)] == [("lr=1e-5",)]


EDITED: dict[str, Any] = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 9}, "metric": "match/accuracy"}


class TestByATask:
    @pytest.fixture
    def sweep(self, load: Callable[..., Sweep]) -> Sweep:
        by = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 9}}
        return load(prune={"after": [1], "by": by}, data={"train": "train.jsonl"})

    def score(self, sweep: Sweep, scores: Mapping[str, float], after: int = 1, **changes: Any) -> None:
        race = get_race(sweep)
        for each in race.contenders:
            if each.points[0] in scores:
                score = {"evaluation_sha256": each.spec_sha256, "asked_metric": None, "score": scores[each.points[0]]}
                adapter = race.find_adapter(each, after)
                assert adapter
                digest = digest_file(adapter / "adapter_model.safetensors")
                write_record(race.get_score_file(each, after), {**score, "adapter_sha256": digest, **changes})

    def test_the_higher_scores_go_on(self, sweep: Sweep) -> None:
        train_parts(sweep, 1)
        assert get_race(sweep).list_missing(1) == []
        assert get_race(sweep).decide() == {1: None}
        self.score(sweep, RATES)
        assert list_staying(sweep, 1) == {"lr=1e-5", "lr=1e-6"}

    @pytest.mark.parametrize("changes", [{"evaluation_sha256": "0"}, {"asked_metric": "x/y"}, {"adapter_sha256": "0"}])
    def test_a_score_of_something_else_does_not_count(self, sweep: Sweep, changes: dict[str, Any]) -> None:
        train_parts(sweep, 1)
        self.score(sweep, RATES, **changes)
        assert get_race(sweep).decide() == {1: None}

    def test_what_was_finished_without_a_score_is_not_compared(self, sweep: Sweep) -> None:
        train_parts(sweep, 1, without="lr=1e-6")
        self.score(sweep, {"lr=1e-3": 0.1, "lr=1e-4": 0.2, "lr=1e-5": 0.3})
        folder = sweep.results / "trainings" / name_training(sweep, "lr=1e-6")
        write_adapter(folder / "adapter", folder / "recipe.yaml", 4, 0.1)
        assert list_staying(sweep, 1) == {"lr=1e-4", "lr=1e-5", "lr=1e-6"}

    @pytest.fixture
    def load_edited(self, load: Callable[..., Sweep]) -> Callable[..., Sweep]:
        """Of a sweep that has ended, load it with another metric: what went on to the end has no number any more."""

        def load_with(by: dict[str, Any], **sections: Any) -> Sweep:
            return load(data={"train": "train.jsonl"}, **{"prune": {"after": [1, 2], "by": by}, **sections})

        sweep = load_with({key: value for key, value in EDITED.items() if key != "metric"})
        train_parts(sweep, 1)
        self.score(sweep, RATES)
        get_race(sweep).write_decision(1)
        train_parts(sweep, 2, {"lr=1e-5": 0, "lr=1e-6": 0})
        self.score(sweep, {"lr=1e-5": 0.9, "lr=1e-6": 0.8}, after=2)
        get_race(sweep).write_decision(2)
        publish_all(sweep)
        return lambda **sections: load_with(EDITED, **sections)

    def test_what_was_let_go_on_keeps_its_place_when_the_task_is_edited(
        self, load_edited: Callable[..., Sweep]
    ) -> None:
        sweep = load_edited()
        assert list_outdated(sweep) == {}
        decision = get_race(sweep).decide()[1]
        assert decision
        whys = {sweep.trainings[name]: verdict["why"] for name, verdict in decision["trainings"].items()}
        assert (whys["lr=1e-6"], whys["lr=1e-3"]) == (
            "an earlier decision let it go on, and it has no score on tasks.py@letters now: it keeps a place of 4, of "
            "which 2 go on",
            "settings that an earlier decision let go on keep all places of 4, of which 2 go on",
        )

    def test_a_larger_share_then_lets_the_best_of_those_go_on_that_were_stopped(
        self, load_edited: Callable[..., Sweep]
    ) -> None:
        larger = {"prune": {"after": [1, 2], "keep": 0.75, "by": EDITED}}
        sweep = load_edited(**larger)
        # Before those that were stopped are scored, it is not known which of them go on.
        assert list_outdated(sweep) == {
            "prune": {"after=1", "after=2"},
            "train_part": {"lr=1e-3__after=2", "lr=1e-4__after=2"},
            "train": {"lr=1e-3", "lr=1e-4", "lr=1e-6"},
        }
        get_race(sweep).record()
        get_decision_file(sweep.results, 1).unlink()  # as Snakemake does
        self.score(sweep, {"lr=1e-3": 0.9, "lr=1e-4": 0.8}, asked_metric="match/accuracy")
        decision = Race.read(sweep.results).write_decision(1)
        assert list_staying(load_edited(**larger), 1) == {"lr=1e-3", "lr=1e-5", "lr=1e-6"}
        # What keeps its place does so in the next decision too.
        (sweep.results / "prune/race.json").unlink()
        assert get_race(load_edited(**larger)).decide()[1] == decision

    def test_an_epoch_that_is_added_before_compares_nothing_that_has_ended(self, load: Callable[..., Sweep]) -> None:
        by = {**EDITED, "metric": None}
        sweep = load(prune={"after": [2], "by": by})
        train_parts(sweep, 2)
        self.score(sweep, RATES, after=2)
        get_race(sweep).write_decision(2)
        publish_all(sweep)
        sweep = load(prune={"after": [1, 2], "by": by})
        assert [list_staying(sweep, after) for after in (1, 2)] == [{*RATES}, {"lr=1e-5", "lr=1e-6"}]
        assert get_race(sweep).list_missing(1) == []
        assert list_outdated(sweep) == {}

    def test_a_point_that_is_added_then_competes_for_the_places_that_are_left(
        self, load_edited: Callable[..., Sweep]
    ) -> None:
        sweep = load_edited(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]}, prune={"after": [1], "by": EDITED})
        train_parts(sweep, 1, {"lr=1e-7": 0})
        self.score(sweep, {"lr=1e-3": 0.9, "lr=1e-4": 0.8, "lr=1e-7": 0.95}, asked_metric="match/accuracy")
        assert list_staying(sweep, 1) == {"lr=1e-5", "lr=1e-6", "lr=1e-7"}

    def test_what_was_finished_before_any_decision_takes_no_place(self, load: Callable[..., Sweep]) -> None:
        train_parts(load(), 1, {})
        publish_all(load())
        for metric in (None, "match/accuracy"):
            by = {**EDITED, "metric": metric}
            sweep = load(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]}, prune={"after": [1], "by": by})
            train_parts(sweep, 1, {"lr=1e-7": 0})
            self.score(sweep, {"lr=1e-7": 0.1}, asked_metric=metric)
            assert list_staying(sweep, 1) == {*RATES, "lr=1e-7"}
            get_race(sweep).write_decision(1)

    def test_the_decision_requests_what_an_evaluation_does(self, sweep: Sweep) -> None:
        assert sweep.get_deciding_gpus("after=1") == sweep.get_evaluation_gpus("baseline") == 1
        assert sweep.request("prune", "mem_mb", "after=1") == sweep.request("evaluate", "mem_mb", "baseline")
        assert sweep.deciding_stage == "eval"

    def test_a_task_that_judges_cannot_decide(self, load: Callable[..., Sweep]) -> None:
        said = (
            r"^mine.yaml: prune.by: 'tasks.py@letters' has the samples of evaluation.tasks.0 \('letters'\), whose "
            "scores would be too good: they would choose the points that they judge"
        )
        with pytest.raises(InputError, match=said):
            load(prune={"after": [1], "by": {"task": "tasks.py@letters"}})


def decide_first(sweep: Sweep) -> None:
    train_parts(sweep, 1)
    get_race(sweep).record()
    get_race(sweep).write_decision(1)


def test_an_ended_continuation_requests_no_gpu_and_little_else(load: Callable[..., Sweep]) -> None:
    sweep = load()
    decide_first(sweep)
    out, on = (name_training(sweep, point) for point in ("lr=1e-6", "lr=1e-3"))
    jobs = [out, get_part_name(out, 2), on, get_part_name(on, 2)]
    assert list(map(sweep.get_train_gpus, jobs)) == [0, 0, 1, 1]
    assert list(map(sweep.get_train_threads, jobs)) == [1, 1, 4, 4]
    rules = ["train", "train_part"] * 2
    memory = [sweep.request(rule, "mem_mb", name) for rule, name in zip(rules, jobs, strict=True)]
    assert memory[:2] == [1000, 1000]
    assert min(memory[2:]) > 3000
    assert sweep.request("train", "runtime", out, attempt=2) == 20
    # The first part is trained whatever was decided.
    assert sweep.get_train_gpus(get_part_name(out, 1)) == 1
    # Nobody reads hundreds of megabytes while jobs are scheduled.
    [weights] = (sweep.results / "trainings" / out / "rungs").rglob("*.safetensors")
    weights.write_text("other")
    assert sweep.get_train_gpus(out) == 0
    # Without the adapter of that epoch, it is trained again.
    shutil.rmtree(sweep.results / "trainings" / out / "rungs")
    assert [sweep.get_train_gpus(out), sweep.get_train_gpus(get_part_name(out, 2))] == [1, 0]


def test_the_adapter_of_the_rung_is_published_with_a_note(load: Callable[..., Sweep]) -> None:
    sweep = load()
    decide_first(sweep)
    training = name_training(sweep, "lr=1e-6")
    folder, part = sweep.results / "trainings" / training, get_part_file(sweep.results, training, 1)
    rung = get_rung_folder(folder, 1)
    assert publish_stopped(folder, part, 1, 4)
    record = json.loads((folder / "adapter/lorasweep.json").read_text())
    assert record == json.loads((rung / "lorasweep.json").read_text()) | {
        "pruned": {"after": 1, "epochs": 4, "seconds": 3.0}
    }
    # Snakemake deletes the record before the job runs again, and the rung is gone by then.
    shutil.rmtree(folder / "rungs")
    (folder / "adapter/lorasweep.json").unlink()
    assert publish_stopped(folder, part, 1, 4)
    assert json.loads((folder / "adapter/lorasweep.json").read_text()) == record
    (folder / "adapter/adapter_model.safetensors").write_text("other")
    assert not publish_stopped(folder, part, 1, 4)


class TestJobs:
    """The last job of a training, by a trainer that only says what it was asked for."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
        asked = list[int | None]()

        class Trainer:
            def train(self, recipe: Path, adapter: Path, *_: object, until: int | None = None) -> None:
                asked.append(until)
                write_adapter(adapter, recipe, until or 4, 0.1)

        monkeypatch.setattr(job, "get_trainer", lambda _: Trainer())
        monkeypatch.setattr(job, "end_on_sigterm", lambda **_: None)
        return asked

    def train(self, sweep: Sweep, training: str) -> Path:
        """Run the job of a training, or of a part of it."""
        options = sweep.get_training_options(training)
        training = split_part_name(training)[0]
        folder = sweep.results / "trainings" / training
        parser = argparse.ArgumentParser()
        job.add_arguments(parser)
        files = ["--recipe", folder / "recipe.yaml", "--adapter", folder / "adapter"]
        job.run(parser.parse_args([*map(str, files), *options]))
        return folder

    def test_one_that_was_stopped_and_has_its_adapter_trains_nothing(
        self, load: Callable[..., Sweep], asked: list[int | None]
    ) -> None:
        decide_first(load())
        folder = self.train(load(), name_training(load(), "lr=1e-6"))
        assert asked == []
        assert json.loads((folder / "adapter/lorasweep.json").read_text())["pruned"]["after"] == 1
        assert not (folder / "rungs").exists()

    def test_one_whose_adapter_is_damaged_is_trained_up_to_where_it_stops(
        self, load: Callable[..., Sweep], asked: list[int | None]
    ) -> None:
        decide_first(load())
        folder = load().results / "trainings" / name_training(load(), "lr=1e-6")
        (folder / "rungs/after=1/adapter_model.safetensors").write_text("other")
        self.train(load(), folder.name)
        assert asked == [1]
        assert json.loads((folder / "adapter/lorasweep.json").read_text())["pruned"]["after"] == 1

    def test_one_that_diverged_and_was_stopped_fails_without_any_training(
        self, load: Callable[..., Sweep], asked: list[int | None]
    ) -> None:
        sweep = load()
        train_parts(sweep, 1, without="lr=1e-6")
        training = name_training(sweep, "lr=1e-6")
        write_record(get_part_file(sweep.results, training, 1), {"after": 1, "diverged": "the loss is nan"})
        note_divergence(sweep, training)
        get_race(sweep).record()
        get_race(sweep).write_decision(1)
        assert [sweep.get_train_gpus(training), sweep.request("train", "mem_mb", training)] == [0, 1000]
        with pytest.raises(
            Diverged, match=r"^the training diverged: the loss is nan \(.* to try again, remove .*json\)"
        ):
            self.train(sweep, training)
        assert asked == []

    def test_one_whose_trainer_says_that_it_diverged_is_behind_all(
        self, load: Callable[..., Sweep], asked: list[int | None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if the trainer leaves no note of that."""
        sweep = load()
        train_parts(sweep, 1, without="lr=1e-3")

        class Trainer:
            def train(self, *_: object, **__: object) -> None:
                raise Diverged("the loss is nan")

        monkeypatch.setattr(job, "get_trainer", lambda _: Trainer())
        self.train(sweep, get_part_name(name_training(sweep, "lr=1e-3"), 1))
        assert list_staying(sweep, 1) == {"lr=1e-4", "lr=1e-5"}

    def test_the_rungs_go_with_the_training_after_prune_is_removed(
        self, load: Callable[..., Sweep], asked: list[int | None]
    ) -> None:
        decide_first(load())
        folder = self.train(load(prune=None), name_training(load(), "lr=1e-6"))
        assert asked == [None]
        assert not (folder / "rungs").exists()


def finish(sweep: Sweep) -> None:
    """Leave a sweep whose trainings have ended, before points take their adapters."""
    train_parts(sweep, 1)
    train_parts(sweep, 2, {"lr=1e-3": 0.1, "lr=1e-4": 0.2})
    get_race(sweep).record()
    for after in (1, 2):
        get_race(sweep).write_decision(after)
    publish_all(sweep)


def publish_all(sweep: Sweep) -> None:
    """Leave what the last parts of trainings leave."""
    for training, point in sweep.trainings.items():
        folder = sweep.results / "trainings" / training
        after = find_end(get_race(sweep).decide(), training)[0]
        if after:
            assert publish_stopped(folder, get_part_file(sweep.results, training, after), after, 4)
        else:
            write_adapter(folder / "adapter", folder / "recipe.yaml", 4, RATES[point])
        shutil.rmtree(folder / "rungs", ignore_errors=True)


def list_outdated(sweep: Sweep) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    owners = sweep.job_names
    for each in find_outdated(sweep):
        if each.rule in ("train", "train_part", "prune", "configure"):
            found.setdefault(each.rule, set()).add(owners.get(each.name, each.name))
    return found


def test_an_ended_race_has_nothing_to_train(load: Callable[..., Sweep]) -> None:
    finish(load())
    assert list_outdated(load()) == {}
    for training in load().trainings:
        assert split_part_name(training) == (training, None)


def test_a_larger_share_trains_only_those_that_go_on_now(load: Callable[..., Sweep]) -> None:
    finish(load())
    # After epoch 1, three of four go on; lr=1e-4 is stopped after epoch 2 by the old share, and may go on by the new.
    assert list_outdated(load(prune={"after": [1, 2], "keep": 0.75})) == {
        "train": {"lr=1e-4", "lr=1e-5"},
        "prune": {"after=1", "after=2"},
        "train_part": {"lr=1e-5__after=2"},
    }
    assert list_outdated(load(prune={"after": [1, 2], "keep": 0.3})) == {}
    assert list_outdated(load(prune=None))["train"] == {"lr=1e-4", "lr=1e-5", "lr=1e-6"}


def test_a_point_that_is_added_may_let_stopped_ones_go_on(load: Callable[..., Sweep]) -> None:
    finish(load())
    outdated = list_outdated(load(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]}))
    assert outdated["train"] == {"lr=1e-4", "lr=1e-5", "lr=1e-6", "lr=1e-7"}
    assert "lr=1e-7__after=1" in outdated["train_part"]
    assert "lr=1e-3__after=1" not in outdated["train_part"]


def test_a_trainer_that_cannot_pause_is_refused(load: Callable[..., Sweep]) -> None:
    said = "^mine.yaml: prune: does not go with trainer: plain_trainer, which has no CAN_PAUSE = True"
    with pytest.raises(InputError, match=said):
        load(trainer="plain_trainer")
