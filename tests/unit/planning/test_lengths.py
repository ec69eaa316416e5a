"""Lengths of samples: the sequences of an epoch, samples that are too long, and what a run is refused for."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.sections import Controls, Data
from lorasweep.layout import LENGTHS
from lorasweep.planning.counting import count_lengths, guess_lengths, read_count
from lorasweep.planning.lengths import Lengths, check_too_long
from lorasweep.running.lengths import check_lengths, get_samples
from lorasweep.running.run import Places, forecast_run
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

PARTS = [[20, 10], [20, 80], [95, 5], [110, 10]]
"""Samples of 30, 100, 100 and 120 tokens."""


def write_data(file: Path, samples: int = len(PARTS)) -> str:
    # The second sample begins in line 3.
    file.write_text('{"input": "a", "output": "b"}\n\n' + '{"input": "a", "output": "b"}\n' * (samples - 1))
    return str(file)


def make(tmp_path: Path, too_long: str = "error", **keys: Any) -> Lengths:
    data = {"train": write_data(tmp_path / "train.jsonl"), "too_long": too_long, **keys}
    return Lengths.count(Data.model_validate(data), PARTS)


class TestSequences:
    @pytest.mark.parametrize(
        ("too_long", "limit", "expected"),
        [
            ("error", None, (4, 350 / 4)),
            ("drop", None, (4, 350 / 4)),
            ("drop", 100, (3, 230 / 3)),
            ("drop", 99, (1, 30)),
            ("drop", 10, (0, 0)),
            ("truncate", 100, (3, 230 / 3)),  # of the last sample no answer is left
            ("truncate", 115, (4, 345 / 4)),
            ("truncate", 90, (2, (30 + 90) / 2)),
        ],
    )
    def test_they_are_the_samples_that_are_not_left_out(
        self, tmp_path: Path, too_long: str, limit: int | None, expected: tuple[int, float]
    ) -> None:
        assert make(tmp_path, too_long).get_sequences(Controls(max_seq_len=limit)) == expected

    @pytest.mark.parametrize(
        ("lengths", "limit", "packs"),
        [
            ([40, 60, 100, 1], 100, 3),
            ([60, 60, 40], 100, 2),
            ([60, 41] * 3, 100, 6),
            ([50] * 4, 100, 2),
            ([100], 100, 1),
        ],
    )
    def test_packs_are_filled_in_order_with_whole_samples(self, lengths: list[int], limit: int, packs: int) -> None:
        counted = Lengths.count(Data(), [[0, length] for length in lengths])
        found = counted.get_sequences(Controls(max_seq_len=limit, packed=True))
        assert found == (packs, sum(lengths) / packs)

    def test_text_is_split_over_packs(self) -> None:
        counted = Lengths.count(Data(format="completion"), [[0, 60]] * 3)
        assert counted.get_sequences(Controls(max_seq_len=100, packed=True)) == (2, 90)

    def test_a_guess_is_of_the_text_of_the_samples_that_are_used(self, tmp_path: Path) -> None:
        file = tmp_path / "data"
        file.write_text(
            '{"input": "aaaa", "output": "éé"}\n' * 2 + '{"input": "' + "long " * 1000 + '", "output": "b"}\n'
        )
        data = Data(train=str(file), max_samples=2)
        assert guess_lengths(data).get_sequences(Controls()) == (2, 2)
        assert guess_lengths(data.model_copy(update={"max_samples": None})).get_sequences(Controls()).mean > 100
        assert guess_lengths(data).get_sequences(Controls(max_seq_len=4, packed=True)).number == 1


class TestTooLong:
    def test_of_none_nothing_is_said(self, tmp_path: Path) -> None:
        assert check_too_long(make(tmp_path), "train", 120) == ""

    def test_they_are_refused_with_their_lines_and_what_would_be_lost(self, tmp_path: Path) -> None:
        with pytest.raises(InputError) as error:
            check_too_long(make(tmp_path), "train", 99)
        file = tmp_path / "train.jsonl"
        assert str(error.value) == (
            f"data.train: 3 of 4 samples have more than max_seq_len = 99 tokens: {file}:3 (100), {file}:4 (100), "
            f"{file}:5 (120). To cut them would lose 11.4% of the tokens to learn, to leave them out 90.5%. "
            "Expected: a larger max_seq_len, or data.too_long: truncate or drop"
        )

    def test_dropped_or_cut_they_are_noted(self, tmp_path: Path) -> None:
        assert check_too_long(make(tmp_path, "drop"), "train", 99).endswith(
            "They are left out, with 90.5% of the tokens to learn (data.too_long: drop)."
        )
        said = check_too_long(make(tmp_path, "truncate"), "train", 99)
        assert "They are cut, which loses 11.4% of the tokens to learn (data.too_long: truncate). 1 of them are" in said

    @pytest.mark.parametrize("too_long", ["drop", "truncate"])
    def test_if_none_is_left_the_run_is_refused(self, tmp_path: Path, too_long: str) -> None:
        with pytest.raises(InputError, match=r"data\.train: 4 of 4 .* None is left\. Expected: a larger max_seq_len"):
            check_too_long(make(tmp_path, too_long), "train", 10)

    def test_of_many_the_first_ten_are_named(self, tmp_path: Path) -> None:
        data = Data(train=write_data(tmp_path / "train.jsonl", 1200), too_long="drop")
        counted = Lengths.count(data, [[1, 9]] * 1100 + [[1, 1]] * 100)
        said = check_too_long(counted, "train", 5)
        assert said.startswith("data.train: 1,100 of 1,200 samples have more than")
        assert said.count("train.jsonl:") == 10
        assert "train.jsonl:11 (10) and 1,090 more. They" in said


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    """A sweep of the data above, whose lengths a command of the test counts."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    write_data(Path("train.jsonl"))

    def load(measured: Any, **sections: Any) -> Sweep:
        config = {
            "experiment": {"name": "mine"},
            "model": {"path": "model", "device": "cpu"},
            "variables": {"seed": [0, 1]},
            "evaluation": {"enabled": False},
            **sections,
            "data": {"train": "train.jsonl", **sections.get("data", {})},
        }
        sweep = Sweep.load(config, "my.yaml")
        command = [sys.executable, "-c", f"print({json.dumps(measured)!r})", "", "", "measure_lengths"]
        points = sweep.points.values()
        recipes = {get_samples(sweep, point): "a recipe" for point in points}
        count_lengths(sweep.results, recipes, lambda *_: (command, os.environ))
        return sweep

    return load


class TestRun:
    MEASURED: dict[str, Any] = {"parts": {"train": PARTS}}  # noqa: RUF012

    def test_nothing_is_checked_that_was_not_counted(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED, controls={"max_seq_len": 50})
        (sweep.results / LENGTHS).unlink()
        assert check_lengths(sweep, set(sweep.points)) == []

    def test_what_is_too_long_is_refused_for_points_that_are_to_be_trained(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED, controls={"max_seq_len": 110})
        assert check_lengths(sweep, set()) == []
        with pytest.raises(
            InputError, match=r"^my\.yaml: data\.train: 1 of 4 samples have .*: train\.jsonl:5 \(120\)\."
        ):
            check_lengths(sweep, {"seed=1"})

    def test_another_way_with_what_is_too_long_needs_no_new_count(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED, controls={"max_seq_len": 110})
        load("none of this is run", controls={"max_seq_len": 110}, data={"too_long": "drop"})
        dropped = load("nor this", controls={"max_seq_len": 110, "batch_size": 3}, data={"too_long": "drop"})
        [note] = check_lengths(dropped, set(dropped.points))
        assert "They are left out" in note
        count = read_count(sweep.results, get_samples(dropped, dropped.points["seed=0"]))
        assert count is not None
        assert count.train is not None
        assert count.train.get_sequences(dropped.points["seed=0"].controls).number == 3

    @pytest.mark.parametrize(
        ("sections", "refused"),
        [
            ({}, r"2 of 4 samples have more than the 99 tokens that the model takes: .*:4 \(100\), .*:5 \(120\)\."),
            ({"controls": {"max_seq_len": 200}}, "2 of 4"),
            ({"controls": {"max_seq_len": 110}, "data": {"too_long": "drop"}}, "1 of 4"),
            ({"controls": {"max_seq_len": 110}, "data": {"too_long": "truncate"}}, "2 of 4"),
            ({"controls": {"max_seq_len": 99}, "data": {"too_long": "truncate"}}, None),
            ({"controls": {"_override": {"model": {"max_seq_len": 120}}}}, None),
            ({"controls": {"_override": {"model": {"_component_": "mine.build"}}}}, None),
            ({"trainer": "trl"}, None),  # a Llama computes its positions
        ],
    )
    def test_what_is_longer_than_the_models_context_is_refused(
        self, load: Callable[..., Sweep], sections: dict[str, Any], refused: str | None
    ) -> None:
        write_checkpoint(Path("short"), max_position_embeddings=99)
        measured = {"parts": {"train": [*PARTS[:1], [10, 10], *PARTS[2:]]}}
        sweep = load(measured, model={"path": "short", "device": "cpu"}, **sections)
        if refused is None:
            check_lengths(sweep, set(sweep.points))
            return
        with pytest.raises(InputError, match=rf"^my\.yaml: data\.train: {refused}"):
            check_lengths(sweep, set(sweep.points))

    def test_validation_samples_are_checked_too(self, load: Callable[..., Sweep]) -> None:
        write_data(Path("validation.jsonl"))
        measured = {"parts": {"train": [[1, 1]] * 4, "validation": PARTS}}
        sweep = load(measured, controls={"max_seq_len": 110}, data={"validation": "validation.jsonl"})
        with pytest.raises(InputError, match=r"data\.validation: 1 of 4 .*validation\.jsonl:5 \(120\)"):
            check_lengths(sweep, set(sweep.points))

    @pytest.mark.parametrize(
        ("controls", "data", "said"),
        [
            ({"packed": True, "max_seq_len": 1000}, {}, "gives no optimizer step with 1 packs, as incomplete"),
            ({"packed": True, "max_seq_len": 120, "gpus": 2, "batch_size": 3}, {}, "on 2 gpus .* with 4 packs"),
            ({"max_seq_len": 100, "batch_size": 4}, {"too_long": "drop"}, "no optimizer step with 3 samples"),
        ],
    )
    def test_fewer_packs_or_samples_than_a_batch_are_refused(
        self, load: Callable[..., Sweep], controls: dict[str, Any], data: dict[str, Any], said: str
    ) -> None:
        sweep = load(self.MEASURED, controls=controls, data=data)
        with pytest.raises(InputError, match=said):
            check_lengths(sweep, set(sweep.points))

    def test_as_many_packs_as_a_batch_will_do(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED, controls={"packed": True, "max_seq_len": 130, "batch_size": 3})
        assert check_lengths(sweep, set(sweep.points)) == []

    def test_a_sample_that_cannot_be_tokenized_is_refused(self, load: Callable[..., Sweep]) -> None:
        sweep = load({"refused": "train.jsonl:3: cannot be tokenized: TemplateError: no"})
        with pytest.raises(InputError, match=r"^my\.yaml: train\.jsonl:3: cannot be tokenized: TemplateError: no"):
            check_lengths(sweep, set(sweep.points))

    def test_another_version_of_a_trainer_counts_anew(
        self, load: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = tmp_path / "counting_trainer.py"
        members = ("recipe", "declared_adapter_only", "measure_lengths", "train")
        module.write_text("STAGE = 'eval'\n" + "".join(f"def {name}(*_): return ''\n" for name in members))
        monkeypatch.syspath_prepend(tmp_path)
        sweep = load(self.MEASURED, trainer="counting_trainer")
        samples = get_samples(sweep, sweep.points["seed=0"])
        assert read_count(sweep.results, samples._replace(trainer="torchtune")) is None
        assert read_count(sweep.results, samples) is not None
        module.write_text(module.read_text() + "# of another tokenizer\n")
        assert read_count(sweep.results, samples) is None

    def test_each_prompt_is_counted(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED, variables={"prompt": ["A {input}", "B {input}"]})
        assert len(json.loads((sweep.results / LENGTHS).read_text())["counts"]) == 2
        Path("train.jsonl").write_text('{"input": "a", "output": "c"}\n' * 4)
        point = next(iter(sweep.points.values()))
        assert read_count(sweep.results, get_samples(sweep, point)) is None

    def test_another_chat_template_is_counted_anew(self, load: Callable[..., Sweep]) -> None:
        sweep = load(self.MEASURED)
        samples = get_samples(sweep, sweep.points["seed=0"])
        Path("own.jinja").write_text("{{ messages }}")
        assert read_count(sweep.results, samples) is not None
        own = samples.model.model_copy(update={"chat_template": "own.jinja"})
        assert read_count(sweep.results, samples._replace(model=own)) is None

    def test_sizes_of_the_same_data_are_counted_once(self, load: Callable[..., Sweep], tmp_path: Path) -> None:
        controls = {"max_seq_len": 200, "batch_size": 1}
        sweep = load(self.MEASURED, variables={"max_samples": [2, None, 3]}, controls=controls)
        [counted] = json.loads((sweep.results / LENGTHS).read_text())["counts"]
        assert counted["max_samples"] is None
        counts = [read_count(sweep.results, get_samples(sweep, point)) for point in sweep.points.values()]
        assert [count.train.parts for count in counts if count and count.train] == [PARTS[:2], PARTS, PARTS[:3]]
        assert check_lengths(sweep, set(sweep.points)) == []
        # What another component of the user's has counted is no sample of the file.
        (sweep.results / LENGTHS).unlink()
        others = load({"parts": {"train": PARTS * 2}}, variables={"max_samples": [2, None]}, controls=controls)
        assert len(json.loads((others.results / LENGTHS).read_text())["counts"]) == 2

    def test_what_is_refused_in_more_samples_may_not_be_in_fewer(self, load: Callable[..., Sweep]) -> None:
        sweep = load({"refused": "train.jsonl:3: no"}, variables={"max_samples": [2, None]})
        assert len(json.loads((sweep.results / LENGTHS).read_text())["counts"]) == 2

    def test_each_point_is_planned_by_its_own_samples(self, load: Callable[..., Sweep]) -> None:
        controls = {"batch_size": 1, "epochs": 2}
        sets = {"first": {"max_samples": 1}, "all": {}, "twice": {"train": ["train.jsonl", "train.jsonl"]}}
        sweep = load(self.MEASURED, variables={"data": [*sets]}, data={"sets": sets}, controls=controls)
        forecast = forecast_run(sweep, {("train", name) for name in sweep.points}, Places(1, None, None))
        assert forecast
        assert {point.name: (point.steps, point.tokens) for point in forecast.points} == {
            "data=first": (2, 60),
            "data=all": (8, 700),
            "data=twice": (8, 700),  # as this trainer counts
        }
        assert forecast.remaining.steps == 18
        seconds = {job.points[0]: job.seconds for job in forecast.jobs.values() if job.rule == "train"}
        assert seconds["data=first"] < seconds["data=all"]

    def test_each_model_has_its_own_notes_and_other_baselines_none(self, load: Callable[..., Sweep]) -> None:
        for name in ("wider", "other"):
            write_checkpoint(Path(name), hidden_size=32)
        Path("tasks.py").write_text("@task\ndef letters():\n    pass\n")
        models = {"small": {"path": "model"}, "wider": {"path": "wider"}}
        sections = {"variables": {"model": [*models]}, "controls": {"max_seq_len": 110}}
        evaluation = {"baselines": [{"name": "other", "model": "other"}], "tasks": ["tasks.py@letters"]}
        data = {"too_long": "truncate"}
        sweep = load(self.MEASURED, models=models, data=data, evaluation=evaluation, **sections)
        notes = check_lengths(sweep, set(sweep.points))
        assert [note.partition(":")[0] for note in notes] == ["point 'model=small'", "point 'model=wider'"]
        forecast = forecast_run(sweep, {("train", name) for name in sweep.points}, Places(1, None, None))
        assert forecast
        assert forecast.planner.is_counted("train")

    def test_what_is_too_long_in_one_set_is_told_with_its_point(self, load: Callable[..., Sweep]) -> None:
        sets = {"cut": {"too_long": "truncate"}, "whole": {}}
        sections = {"variables": {"data": [*sets]}, "data": {"sets": sets}, "controls": {"max_seq_len": 110}}
        sweep = load(self.MEASURED, **sections)
        [note] = check_lengths(sweep, {"data=cut"})
        assert note.startswith("point 'data=cut': data.train: 1 of 4 samples have more than max_seq_len = 110")
        with pytest.raises(InputError, match=r"^my\.yaml: point 'data=whole': data\.train: 1 of 4 samples"):
            check_lengths(sweep, set(sweep.points))
