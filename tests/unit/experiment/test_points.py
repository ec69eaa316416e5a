"""Points: identity by value, names that last, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.experiment.loading import load_experiment, write_experiment
from lorasweep.experiment.points import Point, format_value, get_baselines, get_points, recall_points, record_points
from lorasweep.util.errors import InputError, naming_file


def expand(registry: Path = Path("none.json"), **sections: Any) -> dict[str, Point]:
    config = {"experiment": {"name": "x"}, "model": {"path": "m"}, "data": {"train": "t"}} | sections
    with naming_file("my.yaml"):
        return get_points(load_experiment(config, "my.yaml"), registry)


def run(registry: Path, **sections: Any) -> dict[str, Point]:
    points = expand(registry, **sections)
    record_points(points, registry)
    return points


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "points.json"


def test_every_combination_is_a_point_named_by_its_values() -> None:
    points = expand(variables={"lora_rank": [8, 16], "lr": ["1e-4", 0.05]})
    assert list(points) == [
        "lora_rank=8__lr=1e-4",
        "lora_rank=8__lr=5e-2",
        "lora_rank=16__lr=1e-4",
        "lora_rank=16__lr=5e-2",
    ]
    assert points["lora_rank=8__lr=1e-4"].controls.lr == 1e-4


def test_order_of_variables_and_values_names_nothing_anew() -> None:
    one = expand(variables={"lora_rank": [8, 16], "lr": [1e-4, 3e-4]})
    other = expand(variables={"lr": [3e-4, 1e-4], "lora_rank": [16, 8]})
    assert {n: p.settings for n, p in one.items()} == {n: p.settings for n, p in other.items()}


def test_lists_and_truth_values_stand_in_names() -> None:
    points = expand(variables={"lora_attn_modules": [["q_proj", "v_proj"]], "apply_lora_to_mlp": [True, False]})
    assert "apply_lora_to_mlp=true__lora_attn_modules=q_proj+v_proj" in points


@pytest.mark.parametrize("key", [None, "lr", "lora_alpha"])
@given(st.floats(min_value=1e-12, max_value=1e12))
def test_a_number_in_a_name_is_read_back_exactly(key: str | None, number: float) -> None:
    assert float(format_value(number, key)) == number


def test_a_mapping_is_written_too() -> None:
    assert format_value({"regex": "q_.*"}) == "q_.*"
    assert format_value({"optimizer": {"fused": True}}) == '{"optimizer": {"fused": true}}'


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("lr", 0.01, "1e-2"),
        ("lr", 0.00025, "2.5e-4"),
        ("lr", 1.0, "1e0"),
        ("weight_decay", 0.1, "1e-1"),
        ("weight_decay", 0.0, "0"),
        ("lora_dropout", 0.05, "0.05"),
        ("lora_alpha", 16.0, "16"),
        ("lora_alpha", 16, "16"),
        ("max_samples", 100_000, "100000"),
    ],
)
def test_a_number_is_written_one_way_by_its_key(key: str, value: float, written: str) -> None:
    assert format_value(value, key) == written


def test_a_number_is_one_point_however_the_file_writes_it() -> None:
    written = [["0.01"], ["1e-2"], [0.01], ["1.0E-02"]]
    spelt = [yaml.safe_load(f"lr: [{value}]") for [value] in written]
    assert {name for variables in spelt for name in expand(variables=variables)} == {"lr=1e-2"}
    with pytest.raises(InputError, match="listed twice"):
        expand(variables={"lr": [0.01, "1e-2"]})


def test_distinct_numbers_have_distinct_names() -> None:
    assert format_value(1e-4) == "1e-4" != format_value(1.0001e-4)


class TestNamesLast:
    def test_a_control_that_becomes_a_variable_renames_no_point(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8, 16]}, controls={"lr": 1e-4})
        assert list(run(registry, variables={"lora_rank": [8, 16], "lr": [1e-4]})) == ["lora_rank=8", "lora_rank=16"]

    def test_values_added_later_name_only_their_own_points(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-4})
        run(registry, variables={"lora_rank": [8], "lr": [1e-4]})
        points = run(registry, variables={"lora_rank": [8], "lr": [1e-3, 1e-4]})
        assert {name: point.controls.lr for name, point in points.items()} == {
            "lora_rank=8": 1e-4,
            "lora_rank=8__lr=1e-3": 1e-3,
        }

    def test_a_default_that_becomes_a_variable_renames_no_point(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8]})
        assert list(expand(registry, variables={"lora_rank": [8], "seed": [0]})) == ["lora_rank=8"]

    def test_a_variable_that_becomes_a_control_renames_no_point(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8], "lr": [1e-4, 1e-3]})
        assert list(expand(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-3})) == ["lora_rank=8__lr=1e-3"]

    def test_an_edited_control_changes_points_and_renames_none(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-4})
        assert list(expand(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-3})) == ["lora_rank=8"]

    def test_a_name_never_speaks_of_a_value_that_its_point_no_longer_has(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8], "lr": [1e-4]})
        run(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-4})
        assert list(expand(registry, variables={"lora_rank": [8]}, controls={"lr": 1e-3})) == ["lora_rank=8"]

    def test_names_are_the_same_without_the_record_in_a_sweep_that_only_grew(self, registry: Path) -> None:
        run(registry, variables={"lora_rank": [8], "lr": [1e-4]})
        grown = {"lora_rank": [4, 8], "lr": [1e-4, 1e-3]}
        assert list(expand(registry, variables=grown)) == list(expand(variables=grown))

    def test_a_run_lends_its_name_to_no_point_of_the_grid(self, registry: Path) -> None:
        run(registry, runs=[{"name": "small", "lora_rank": 4}])
        assert list(expand(registry, variables={"lora_rank": [4]})) == ["lora_rank=4"]

    def test_a_record_that_is_not_ours_is_named(self, registry: Path) -> None:
        for text in ("{", "[1]"):
            registry.write_text(text)
            with pytest.raises(InputError, match=r"points\.json: not the record"):
                expand(registry, variables={"lora_rank": [4]})


def test_exclude_leaves_out_what_has_all_of_its_values() -> None:
    points = expand(
        variables={"lora_rank": [8, 16], "lr": [1e-4, 1e-3]},
        exclude=[{"lora_rank": 16, "lr": "1e-3"}],
    )
    assert "lora_rank=16__lr=1e-3" not in points
    assert len(points) == 3


def draw(points: int = 20, seed: int = 0, **space: Any) -> dict[str, Any]:
    space = space or {"lr": {"log_uniform": ["1e-5", 1e-3]}, "lora_rank": [8, 16, 32]}
    return {"sample": {"points": points, "seed": seed, "space": space}}


GRID: dict[str, Any] = {"variables": {"lora_rank": [8, 64], "lr": [1e-4, 1e-3]}}
ALL = {"lora_rank=8__lr=1e-4", "lora_rank=8__lr=1e-3", "lora_rank=64__lr=1e-4", "lora_rank=64__lr=1e-3"}


@pytest.mark.parametrize(
    ("condition", "left_out"),
    [
        ("lora_rank > 32 and lr >= 1e-3", {"lora_rank=64__lr=1e-3"}),
        ("lora_rank > 32 or lr >= 1E-3", ALL - {"lora_rank=8__lr=1e-4"}),
        ("not (lora_rank == 8)", {"lora_rank=64__lr=1e-4", "lora_rank=64__lr=1e-3"}),
        ("8 <= lora_rank < 64 and lr == 0.001", {"lora_rank=8__lr=1e-3"}),
        ("lora_rank in [8, 16] and lr not in [1e-3]", {"lora_rank=8__lr=1e-4"}),
        ("lora_rank * lr > batch_size * 0.03", {"lora_rank=64__lr=1e-3"}),
        ("lora_rank - 60 > 0 and -lr < -5e-4", {"lora_rank=64__lr=1e-3"}),
        ("lora_alpha == null and packed == false and lora_rank == 8", {"lora_rank=8__lr=1e-4", "lora_rank=8__lr=1e-3"}),
        (
            "(lora_alpha != null and lora_alpha > 1) or lora_rank == 64",
            {"lora_rank=64__lr=1e-4", "lora_rank=64__lr=1e-3"},
        ),
        (
            "model_format == 'adapter' and 'q_proj' in lora_attn_modules and lr < 5e-4 and lora_rank < 9",
            {"lora_rank=8__lr=1e-4"},
        ),
    ],
)
def test_exclude_leaves_out_what_a_condition_is_true_of(condition: str, left_out: set[str]) -> None:
    assert ALL - expand(**GRID, exclude=[condition]).keys() == left_out


def test_conditions_and_values_stand_side_by_side_and_leave_out_of_draws_too() -> None:
    assert len(expand(**GRID, exclude=["lora_rank > 8 and lr > 5e-4", {"lora_rank": 8, "lr": 1e-4}])) == 2
    points = expand(**draw(40), exclude=["lr > 1e-4 and lora_rank >= 16", "lr > 1"])
    assert points == {
        name: point
        for name, point in expand(**draw(40)).items()
        if not (point.controls.lr > 1e-4 and point.controls.lora_rank >= 16)
    }


def test_zipped_variables_vary_together_and_are_crossed_with_the_others() -> None:
    variables = {"lora_rank": [8, 16, 16], "lr": [1e-4, 1e-3], "lora_alpha": [16, 16, 32]}
    points = expand(variables=variables, zip=[["lora_alpha", "lora_rank"]])
    assert list(points) == [
        "lora_alpha=16__lora_rank=8__lr=1e-4",
        "lora_alpha=16__lora_rank=8__lr=1e-3",
        "lora_alpha=16__lora_rank=16__lr=1e-4",
        "lora_alpha=16__lora_rank=16__lr=1e-3",
        "lora_alpha=32__lora_rank=16__lr=1e-4",
        "lora_alpha=32__lora_rank=16__lr=1e-3",
    ]
    assert points["lora_alpha=32__lora_rank=16__lr=1e-4"].controls.lora_alpha == 32
    grid = expand(variables={"lora_rank": [8, 16], "lora_alpha": [16, 32], "lr": [1e-4, 1e-3]})
    assert set(points) <= set(grid)


def test_what_is_zipped_and_its_order_name_nothing_anew(registry: Path) -> None:
    variables = {"lora_rank": [8, 16], "lora_alpha": [16, 32]}
    before = run(registry, variables=variables, zip=[["lora_rank", "lora_alpha"]])
    assert before.items() <= expand(registry, variables=variables).items()
    backwards = {key: values[::-1] for key, values in reversed(variables.items())}
    after = expand(registry, variables=backwards, zip=[["lora_alpha", "lora_rank"]])
    assert {n: p.settings for n, p in before.items()} == {n: p.settings for n, p in after.items()}


def test_runs_stand_beside_the_grid_with_names_values_and_overrides_of_their_own() -> None:
    points = expand(
        variables={"lora_rank": [8]},
        controls={"_override": {"optimizer": {"fused": True}}},
        runs=[{"name": "wide", "lora_rank": 64, "lr": "1e-5", "_override": {"optimizer": {"betas": [0.9, 0.95]}}}],
    )
    assert list(points) == ["lora_rank=8", "wide"]
    assert points["wide"].controls.lr == 1e-5
    assert points["wide"].controls.override == {"optimizer": {"fused": True, "betas": [0.9, 0.95]}}


def test_interpolation_in_a_runs_own_override_is_left_to_the_recipe_as_in_that_of_controls() -> None:
    own = {"note": "${controls.lora_rank}", "optimizer": {"eps": "${lr}"}, "bad": "${"}
    runs = [{"name": "wide", "lora_rank": 64, "seed": "${lora_rank}", "_override": own}]
    points = expand(controls={"lora_rank": 8, "_override": {"optimizer": {"fused": True}}}, runs=runs)
    assert points["wide"].controls.override == {**own, "optimizer": {"fused": True, "eps": "${lr}"}}
    assert points["wide"].controls.seed == 64


def test_a_run_is_asked_in_its_own_way_and_others_as_the_data_says(registry: Path) -> None:
    data = {"train": "t", "system_prompt": "Be brief.", "prompt": "Say {input}"}
    runs = [{"name": "own", "prompt": "Tell {input}"}, {"name": "bare", "prompt": "", "system_prompt": None}]
    points = run(registry, data=data, variables={"lora_rank": [8]}, runs=runs)
    asked = {name: (point.data.system_prompt, point.data.prompt) for name, point in points.items()}
    assert asked == {
        "lora_rank=8": ("Be brief.", "Say {input}"),
        "own": ("Be brief.", "Tell {input}"),
        "bare": (None, None),
    }
    assert points["own"].settings["prompt"] == "Tell {input}"
    assert not points["bare"].settings.keys() & {"prompt", "system_prompt"}


def test_a_system_prompt_that_becomes_a_variable_renames_no_point(registry: Path) -> None:
    run(registry, variables={"lora_rank": [8]}, data={"train": "t", "system_prompt": "Short."})
    points = run(registry, variables={"lora_rank": [8], "system_prompt": ["Short.", "Long.", None]})
    assert list(points) == ["lora_rank=8", "lora_rank=8__system_prompt=Long.", "lora_rank=8__system_prompt=null"]


def test_prompts_stand_in_names_by_how_they_begin_and_a_digest() -> None:
    prompts = ["Say: {input}", "Say: {input}!", None]
    points = expand(data={"train": "t"}, variables={"prompt": prompts, "seed": [0, 1]})
    assert len(points) == 6
    assert {point.data.prompt for point in points.values()} == set(prompts)
    names = [name for name in points if name.endswith("__seed=0")]
    assert [name.rpartition("-")[0] for name in names] == ["prompt=Say_input", "prompt=Say_input", ""]
    assert names[2] == "prompt=null__seed=0"


class TestData:
    SETS: dict[str, Any] = {  # noqa: RUF012
        "train": "t",
        "max_samples": 50,
        "sets": {"short": {"train": "s", "max_samples": None}, "told": {"system_prompt": "Short.", "format": "alpaca"}},
    }

    def test_a_set_lies_over_the_section_and_a_variable_over_the_set(self) -> None:
        variables = {"data": ["short", "told"], "format": ["instruct"]}
        runs = [{"name": "own", "data": "told", "max_samples": 3}, {"name": "plain"}]
        points = expand(data=self.SETS, variables=variables, runs=runs)
        seen = {n: (p.data.train, p.data.max_samples, p.data.format, p.data.system_prompt) for n, p in points.items()}
        assert seen == {
            "data=short__format=instruct": ("s", None, "instruct", None),
            "data=told__format=instruct": ("t", 50, "instruct", "Short."),
            "own": ("t", 3, "alpaca", "Short."),
            "plain": ("t", 50, "instruct", None),
        }
        own, plain = points["own"].settings, points["plain"].settings
        assert {"data": "told", "max_samples": 3, "format": "alpaca", "system_prompt": "Short."}.items() <= own.items()
        assert plain["max_samples"] == 50
        assert not {"data", "train", "format"} & plain.keys()

    def test_every_way_to_vary_takes_its_keys(self) -> None:
        points = expand(
            data=self.SETS,
            variables={"data": ["short", "told"], "lora_rank": [4, 8], "train_on_input": [True, False]},
            zip=[["data", "lora_rank"]],
            sample={"points": 2, "space": {"max_samples": {"int_log_uniform": [10, 1000]}, "too_long": ["drop"]}},
            exclude=[{"data": "short", "train_on_input": True}, "format == 'alpaca' and train_on_input"],
        )
        assert len(points) == 4
        assert {(p.data_set, p.controls.lora_rank) for p in points.values()} == {("short", 4), ("told", 8)}
        assert not any(point.data.train_on_input for point in points.values())
        assert {point.data.too_long for point in points.values()} == {"drop"}

    def test_lists_of_files_can_be_excluded(self) -> None:
        variables = {"train": ["a", ["a", "b"]]}
        for entry in ({"train": ["a", "b"]}, "train == ['a', 'b']"):
            assert list(expand(variables=variables, exclude=[entry])) == ["train=a"]

    def test_sets_that_can_be_drawn_need_not_be(self) -> None:
        assert len(expand(data=self.SETS, **draw(1, data=["short", "told"]))) == 1

    def test_files_are_named_by_their_last_part_and_a_digest(self) -> None:
        files = ["short.jsonl", "../a/train_of_last_summer.jsonl", ["a/b.jsonl", "c.csv"], "../b/x", "../c/x"]
        names = list(expand(variables={"train": files}))
        assert names[0] == "train=short.jsonl"
        assert [re.sub("-[0-9a-f]{6}$", "-", name) for name in names[1:]] == [
            "train=train_of_last_summer-",
            "train=b_jsonl_c_csv-",
            "train=x-",
            "train=x-",
        ]

    @pytest.mark.parametrize("key", ["max_samples", "train", "format", "system_prompt"])
    def test_a_key_that_becomes_a_variable_renames_no_point(self, registry: Path, key: str) -> None:
        values: list[Any] = {"max_samples": [9, None], "format": ["alpaca", "instruct"]}.get(key, ["t", "u"])
        run(registry, variables={"seed": [0]}, data={"train": "t", key: values[0]})
        points = run(registry, variables={"seed": [0], key: values})
        assert next(iter(points)) == "seed=0"
        assert len(points) == 2
        assert list(run(registry, variables={"seed": [0]}, data={"train": "t", key: values[0]})) == ["seed=0"]

    def test_an_edited_set_renames_no_point(self, registry: Path) -> None:
        variables = {"data": ["short", "told"]}
        before = run(registry, variables=variables, data=self.SETS)
        sets = {**self.SETS["sets"], "short": {"train": "elsewhere", "max_samples": 7}}
        after = run(registry, variables=variables, data={**self.SETS, "sets": sets})
        assert list(before) == list(after) == ["data=short", "data=told"]
        assert after["data=short"].data.max_samples == 7

    def test_an_adapter_has_of_a_set_what_it_is_asked_with(self, adapter: str) -> None:
        runs = [{"name": "theirs", "adapter": adapter, "data": "told"}, {"name": "a", "data": "short"}]
        settings = expand(data=self.SETS, runs=runs)["theirs"].settings
        assert settings == {"adapter": adapter, "data": "told", "system_prompt": "Short.", "mode": "B1"}


class TestDerivedControls:
    def test_each_point_has_its_own_value(self) -> None:
        points = expand(
            controls={"lora_alpha": "${lora_rank}", "num_warmup_steps": "${controls.lora_alpha}", "lora_rank": 2},
            variables={"lora_rank": [4, 8]},
            runs=[
                {"name": "own", "lora_rank": 16},
                {"name": "fixed", "lora_rank": 16, "lora_alpha": 5.0},
                {"name": "other", "seed": "${max_samples}", "max_samples": 7, "lora_rank": "${seed}"},
            ],
        )
        assert {name: (p.controls.lora_alpha, p.controls.num_warmup_steps) for name, p in points.items()} == {
            "lora_rank=4": (4, 4),
            "lora_rank=8": (8, 8),
            "own": (16, 16),
            "fixed": (5, 5),
            "other": (7, 7),
        }
        assert points["lora_rank=8"].settings["lora_alpha"] == 8

    def test_a_run_sees_its_own_values_of_others(self) -> None:
        runs = [{"name": "x", "lora_rank": "${batch_size}", "max_seq_len": "${lora_alpha}"}]
        controls = {"lora_rank": 8, "lora_alpha": "${lora_rank}", "batch_size": 4}
        own = expand(controls=controls, runs=runs)["x"].controls
        assert (own.lora_rank, own.lora_alpha, own.max_seq_len) == (4, 4, 4)

    def test_a_file_on_the_hub_is_made_of_none(self) -> None:
        with pytest.raises(InputError, match=r"runs.0.train: .* is invalid. Expected: a file on the hub without"):
            expand(runs=[{"name": "x", "train": "hf://datasets/org/name/part${seed}.jsonl"}])

    def test_conditions_see_it(self) -> None:
        assert list(expand(controls={"lr": "1e-${lora_rank}"}, variables={"lora_rank": [4, 8]}, exclude=["lr < 1e-6"]))
        grid = {"controls": {"lora_alpha": "${lora_rank}"}, "variables": {"lora_rank": [4, 8]}}
        assert list(expand(**grid, exclude=["lora_alpha > 4"])) == ["lora_rank=4"]

    def test_it_is_written_as_it_was_given(self, tmp_path: Path) -> None:
        controls = {"lora_alpha": "${lora_rank}", "_override": {"note": "${lr}"}}
        given = {"controls": controls, "runs": [{"name": "a", "lora_rank": 4, "seed": "${lora_rank}"}]}
        config = {"experiment": {"name": "x"}, "model": {"path": "m"}, **given}
        write_experiment(load_experiment(config, "my.yaml"), tmp_path / "written.yaml")
        written = yaml.safe_load((tmp_path / "written.yaml").read_text())
        assert (written["controls"]["lora_alpha"], written["runs"]) == ("${lora_rank}", given["runs"])
        assert load_experiment(written, "written.yaml").derived == {"lora_alpha": "${lora_rank}"}


def test_sets_are_written_with_the_keys_that_they_have(tmp_path: Path) -> None:
    data = {"train": "t", "max_samples": 9, "sets": {"all": {"max_samples": None}, "few": {"train": ["a", "b"]}}}
    config = {"experiment": {"name": "x"}, "model": {"path": "m"}, "data": data}
    write_experiment(load_experiment(config, "my.yaml"), tmp_path / "written.yaml")
    assert yaml.safe_load((tmp_path / "written.yaml").read_text())["data"]["sets"] == data["sets"]


def test_modes_can_be_varied() -> None:
    points = expand(
        variables={"model_format": ["hf", "adapter"], "merge_adapters": [True, False]},
        exclude=[{"model_format": "hf", "merge_adapters": False}],
    )
    assert [point.mode for point in points.values()] == ["A", "B1", "B2"]
    assert list(points) == ["mode=A", "mode=B1", "mode=B2"]
    in_short = expand(variables={"mode": ["A", "B1", "B2"]})
    assert in_short == points
    assert list(expand(variables={"merge_adapters": [True, False], "seed": [0]})) == [
        "mode=B1__seed=0",
        "mode=B2__seed=0",
    ]
    assert expand(runs=[{"name": "full", "mode": "A"}])["full"].mode == "A"


def test_what_is_excluded_may_speak_of_the_mode_in_either_way() -> None:
    modes = {"mode": ["A", "B1", "B2"], "lora_rank": [4, 8]}
    for left_out in ({"mode": "A", "lora_rank": 8}, "mode == 'A' and lora_rank == 8"):
        assert "lora_rank=8__mode=A" not in expand(variables=modes, exclude=[left_out])
    keys = {"model_format": ["hf", "adapter"], "lora_rank": [4, 8]}
    assert "lora_rank=8__mode=A" not in expand(variables=keys, exclude=["mode == 'A' and lora_rank == 8"])


def test_what_is_excluded_may_speak_of_the_parts_of_the_mode() -> None:
    modes = {"mode": ["A", "B1", "B2"]}
    for condition, kept in (
        ("merge_adapters and model_format == 'adapter'", ["mode=A", "mode=B2"]),
        ("model_format == 'hf'", ["mode=B1", "mode=B2"]),
        ("not merge_adapters", ["mode=A", "mode=B1"]),
    ):
        assert list(expand(variables=modes, exclude=[condition])) == kept


def test_the_mode_beside_what_it_stands_for_is_refused() -> None:
    with pytest.raises(InputError, match=r"variables\.mode: replaces model_format, which is also set"):
        expand(variables={"mode": ["A"], "model_format": ["hf"]})
    with pytest.raises(InputError, match=r"runs\.0\.mode: replaces merge_adapters, which is also set"):
        expand(runs=[{"name": "both", "mode": "A", "merge_adapters": True}])
    with pytest.raises(InputError, match=r"variables\.mode\.0: 'C' is invalid. Expected: 'A', 'B1' or 'B2'"):
        expand(variables={"mode": ["C"]})


class TestSample:
    def test_as_many_points_are_drawn_as_are_asked_for_and_lie_in_the_space(self) -> None:
        points = expand(**draw(300))
        assert len(points) == 300
        assert {point.controls.lora_rank for point in points.values()} == {8, 16, 32}
        rates = [point.controls.lr for point in points.values()]
        assert all(1e-5 <= rate <= 1e-3 for rate in rates)
        assert 100 < sum(rate < 1e-4 for rate in rates) < 200
        assert all(rate == float(f"{rate:.3g}") for rate in rates)

    def test_the_draws_of_a_seed_are_what_they_were(self) -> None:
        assert list(expand(**draw(3))) == [
            "lora_rank=8__lr=5.01e-4",
            "lora_rank=16__lr=2.11e-5",
            "lora_rank=32__lr=3.32e-5",
        ]

    def test_a_larger_number_begins_with_the_smaller(self) -> None:
        assert list(expand(**draw(50)))[:20] == list(expand(**draw(20)))

    def test_another_seed_draws_other_points(self) -> None:
        assert len(expand(**draw(seed=1)).keys() & expand(**draw(seed=2)).keys()) < 5

    def test_the_order_of_keys_is_of_no_matter_and_a_range_only_of_its_own_key(self) -> None:
        space = draw()["sample"]["space"]
        assert list(expand(**draw(**dict(reversed(space.items()))))) == list(expand(**draw()))
        wider = expand(**draw(**space | {"lr": {"log_uniform": [1e-6, 1e-2]}}))
        ranks = [[point.controls.lora_rank for point in points.values()] for points in (wider, expand(**draw()))]
        assert ranks[0] == ranks[1]

    def test_no_point_is_drawn_twice_and_small_spaces_are_drawn_whole(self) -> None:
        points = expand(**draw(6, lora_rank=[8, 16], epochs=[1, 2, 3]))
        assert len(points) == 6

    def test_whole_numbers_are_drawn_up_to_both_bounds(self) -> None:
        space = {"epochs": {"int_uniform": [1, 3]}, "lora_rank": {"int_log_uniform": [1, 4]}}
        points = expand(**draw(12, **space))
        assert {(p.controls.epochs, p.controls.lora_rank) for p in points.values()} == {
            (epochs, rank) for epochs in (1, 2, 3) for rank in (1, 2, 3, 4)
        }

    def test_numbers_are_drawn_between_bounds(self) -> None:
        dropouts = [
            point.controls.lora_dropout for point in expand(**draw(40, lora_dropout={"uniform": [0, 0.2]})).values()
        ]
        assert min(dropouts) >= 0
        assert max(dropouts) <= 0.2
        assert len(set(dropouts)) == 40

    def test_draws_are_crossed_with_variables_and_left_out_by_exclude(self) -> None:
        points = expand(variables={"seed": [0, 1]}, **draw(5))
        assert len(points) == 10
        assert set(points) == {f"{name}__seed={seed}" for name in expand(**draw(5)) for seed in (0, 1)}
        kept = expand(variables={"seed": [0, 1]}, exclude=[{"lora_rank": 8, "seed": 0}], **draw(5))
        assert points.keys() - kept.keys() == {name for name in points if "rank=8__lr" in name and "seed=0" in name}
        assert len(expand(exclude=[{"lora_rank": 64}], **draw(5))) == 5

    def test_drawn_points_keep_their_names(self, registry: Path) -> None:
        before = run(registry, **draw(5))
        assert list(expand(registry, **draw(9)))[:5] == list(before)
        rates = {"lr": [point.controls.lr for point in before.values()]}
        fixed = expand(registry, variables=rates | {"lora_rank": [8, 16, 32]})
        assert before.keys() <= fixed.keys()


RANKS = {"lora_rank": [8, 16], "lora_alpha": [16, 32], "lr": [1e-4]}


def sets(*names: str) -> dict[str, Any]:
    """The section `data` with sets of these names, each with a file of its own."""
    return {"data": {"train": "t", "sets": {name: {"train": f"{name}.jsonl"} for name in names}}}


def models(*names: str, **keys: Any) -> dict[str, Any]:
    """The sections of an experiment with models of these names, and no other."""
    return {"model": {"device": "cpu"}, "models": {name: {"path": f"models/{name}", **keys} for name in names}}


def test_a_model_is_chosen_by_its_name_and_its_keys_replace_those_of_all(registry: Path) -> None:
    named = models("small", "large")
    named["model"]["dtype"] = "fp32"
    named["models"]["large"] |= {"dtype": "bf16", "quantize": "nf4", "trainer": "trl"}
    sections = {
        **named,
        "variables": {"model": ["small", "large"], "lora_rank": [4, 8]},
        "exclude": ["model == 'large' and trainer == 'trl' and lora_rank == 8"],
        "runs": [{"name": "other", "model": "large", "trainer": "torchtune", "lora_rank": 2}],
    }
    points = run(registry, **sections)
    assert list(points) == ["lora_rank=4__model=small", "lora_rank=8__model=small", "lora_rank=4__model=large", "other"]
    small, large = points["lora_rank=4__model=small"], points["lora_rank=4__model=large"]
    assert (small.model.path, small.model.dtype, small.model.quantize, small.trainer) == (
        *("models/small", "fp32", None),
        "torchtune",
    )
    assert (large.model.path, large.model.dtype, large.model.device) == ("models/large", "bf16", "cpu")
    assert (large.model.quantize, large.trainer, points["other"].trainer) == ("nf4", "trl", "torchtune")
    assert large.settings["model"] == "large"
    experiment = load_experiment({"experiment": {"name": "x"}, **sections}, "my.yaml")
    assert recall_points(experiment, registry) == {
        name: replace(p, swept=tuple(sorted(p.swept))) for name, p in points.items()
    }
    baselines = get_baselines(experiment, points)
    assert {name: baseline.model.dtype for name, baseline in baselines.items()} == {
        "baseline__model=small": "fp32",
        "baseline__model=large": "bf16",
    }
    assert [baseline.settings for baseline in baselines.values()] == [
        {"mode": "base", "model": "large"},
        {"mode": "base", "model": "small"},
    ]


def test_a_model_can_be_drawn_and_stand_beside_the_section_model() -> None:
    sections = models("large") | {
        "model": {"path": "models/small"},
        "runs": [{"name": "a"}, {"name": "b", "model": "large"}],
    }
    points = expand(**sections)
    assert {name: point.model.path for name, point in points.items()} == {"a": "models/small", "b": "models/large"}
    experiment = load_experiment({"experiment": {"name": "x"}, **sections}, "my.yaml")
    assert list(get_baselines(experiment, points)) == ["baseline", "baseline__model=large"]
    drawn = draw(4, model=["small", "large"], lr={"log_uniform": [1e-5, 1e-3]})
    assert {point.model_name for point in expand(**models("small", "large"), **drawn).values()} <= {"small", "large"}


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({**models("a"), "variables": {"model": ["b"]}}, ["variables.model.0: 'b' is invalid", "Expected: a"]),
    ({**models("a", "b"), "variables": {"model": ["a"]}}, ["models.b: no point has this model", "[a, b]", "model: b"]),
    (
        {**models("a"), "runs": [{"name": "c", "model": "a"}, {"name": "d"}]},
        ["model.path: is missing, and the point 'd'"],
    ),
    ({"variables": {"model": ["a"]}}, ["variables.model.0: 'a' is invalid", "a name, described by models"]),
    ({**models("a", device="cpu"), "variables": {"model": ["a"]}}, ["unknown key 'models.a.device'"]),
    (
        {**models("a"), "variables": {"model": ["a"]}, "evaluation": {"base_model": "m"}},
        ["evaluation.base_model: 'm' is invalid beside models"],
    ),
    ({}, ["nothing to run"]),
    ({"variables": {"lora_rnk": [8]}}, ["variables.lora_rnk", "did you mean 'lora_rank'"]),
    ({"variables": {"lora_rank": [0]}}, ["variables.lora_rank.0", "0", "greater than or equal to 1"]),
    ({"variables": {"lora_rank": ["8"]}}, ["variables.lora_rank.0", "'8'", "integer"]),
    ({"variables": {"lr": [1e-3, "1e-3"]}}, ["variables.lr", "0.001", "listed twice"]),
    ({"variables": {"lora_rank": [8]}, "exclude": [{"lora_rank": 9}]}, ["exclude.0.lora_rank", "9", "[8]"]),
    ({"variables": {"lora_rank": [8]}, "exclude": [{"lr": 1e-3}]}, ["exclude.0.lr", "lora_rank"]),
    ({"variables": RANKS, "zip": [["lora_rank", "lora_alpa"]]}, ["zip.0", "'lora_alpa'", "did you mean 'lora_alpha'"]),
    ({"variables": RANKS, "zip": [["lora_rank", "lr"]]}, ["zip.0", "lora_rank has 2, lr has 1 values", "same number"]),
    *(
        ({**GRID, "exclude": [condition]}, ["my.yaml: exclude.0", *said])
        for condition, said in (
            ("lora_rank > 64", ["excludes no point"]),
            ("lora_rnk > 32", ["unknown key 'lora_rnk'", "did you mean 'lora_rank'"]),
            ("lora_rank = 8", ["invalid syntax", "comparisons (< <= > >= == !="]),
            ("lora_rank > 8 && lr > 1", ["invalid syntax", "joined by and, or"]),
            ("lora_rank", ["it is 8, neither true nor false"]),
            ("lora_rank and lr", ["'lora_rank' is 8, neither true nor false"]),
            ("lora_alpha > 8", ["not supported between", "lora_alpha: None"]),
            ("lora_rank > '8'", ["not supported between"]),
            ("lora_rank / 0 > 1", ["division by zero"]),
            ("lora_rank in 8", ["lora_rank: 8"]),
            ("'a' * 1000 == 'a'", ["'a' is not a number"]),
            ("lora_rank ** 99 ** 99 > 1", ["'lora_rank ** 99 ** 99' is not supported"]),
            ("__import__('os').system('true') == 0", ["unknown key '__import__'"]),
            ("lora_rank.bit_length() > 1", ["'lora_rank.bit_length()' is not supported"]),
            ("lora_attn_modules[0] == 'q_proj'", ["'lora_attn_modules[0]' is not supported"]),
            ("[r for r in [lora_rank]] == [8]", ["unknown key 'r'"]),
            ("(lambda: 1) == 1", ["'lambda: 1' is not supported"]),
            ("f'{lr}' == 'x'", ["is not supported"]),
            ("(lr := 1) > 0", ["is not supported"]),
            ("lr > 1j", ["'1j' is not supported"]),
            ("lr > 1\0", ["null bytes"]),
            ("(" * 400 + "lr" + ")" * 400 + " > 1", ["too many nested parentheses"]),
            ("lr > 1 " * 200, ["1400 characters", "1000 at most"]),
            ("", ["at least 1 character"]),
        )
    ),
    (draw(lora_rnk=[8]), ["sample.space.lora_rnk", "did you mean 'lora_rank'"]),
    (draw(1, lora_rank=[8] * 99 + ["8"]), ["sample.space.lora_rank.99", "'8'", "integer"]),
    (draw(lora_rank={"uniform": [4, 64]}), ["sample.space.lora_rank", "a valid integer"]),
    (draw(lora_dropout={"uniform": [0.5, 1.5]}), ["sample.space.lora_dropout", "less than 1"]),
    (draw(lr={"log_uniform": [0, 1]}), ["sample.space.lr.log_uniform.0", "0", "greater than 0"]),
    (draw(lr={"log_uniform": [1e-3, 1e-5]}), ["sample.space.lr", "the smaller first"]),
    (draw(lr={"log_uniform": [1e-3]}), ["sample.space.lr.log_uniform", "at least 2 items"]),
    (draw(lr={"loguniform": [1e-5, 1e-3]}), ["sample.space.lr.loguniform", "did you mean 'log_uniform'"]),
    (draw(lr={}), ["sample.space.lr", "one of choices, uniform"]),
    (draw(7, lora_rank=[8, 16], epochs=[1, 2, 3]), ["sample.points: 7", "found 6 points", "larger space"]),
    ({"variables": {"lr": [1e-4]}, **draw()}, ["sample.space.lr", "also in 'variables'"]),
    ({"exclude": [{"seed": 1}], **draw()}, ["exclude.0.seed", "keys of variables: lr, lora_rank"]),
    ({"variables": RANKS, "zip": [["lora_rank"]]}, ["zip.0", "at least 2 items"]),
    ({"variables": RANKS, "zip": [["lora_rank", "lora_rank"]]}, ["zip.0", "'lora_rank' is already in 'zip'"]),
    (
        {"variables": RANKS, "zip": [["lora_rank", "lora_alpha"], ["lr", "lora_rank"]]},
        ["zip.1", "'lora_rank' is already in 'zip'"],
    ),
    (
        {"variables": {"lora_rank": [8, 8], "lora_alpha": [16, 16]}, "zip": [["lora_rank", "lora_alpha"]]},
        ["variables.lora_rank+lora_alpha", "8, 16", "listed twice"],
    ),
    (
        {"variables": RANKS, "zip": [["lora_rank", "lora_alpha"]], "exclude": [{"lora_rank": 8, "lora_alpha": 32}]},
        ["exclude.0", "excludes no point", "together"],
    ),
    ({"variables": {"lora_rank": [8]}, "runs": [{"name": "again", "lora_rank": 8}]}, ["lora_rank=8", "again", "same"]),
    ({"variables": {"model_format": ["hf"], "merge_adapters": [True, False]}}, ["same", "no effect", "exclude"]),
    ({"runs": [{"name": "a", "lora_rank": 4}, {"name": "a", "lora_rank": 8}]}, ["two points are named 'a'"]),
    ({"runs": [{"lora_rank": 4}]}, ["runs.0.name", "None"]),
    ({"runs": [{"name": "baseline"}]}, ["baseline"]),
    ({"runs": [{"name": "baseline__model=a"}]}, ["'baseline__model=a' is a reserved name"]),
    ({"runs": [{"name": "results.csv"}]}, ["results.csv"]),
    ({"runs": [{"name": "a", "_override": 5}]}, ["runs.0._override", "5", "a mapping"]),
    ({"runs": [{"name": "a", "prompt": "Say {word}"}]}, ["runs.0.prompt", "'Say {word}'", "text with {input}"]),
    ({"runs": [{"name": n, "prompt": p} for n, p in (("a", ""), ("b", "{input}"))]}, ["'a' and 'b' are the same"]),
    ({"runs": [{"name": "a"}, {"name": "b", "max_samples": None}]}, ["'a' and 'b' are the same"]),
    ({"runs": [{"name": "a"}, {"name": "b", "train": "t"}]}, ["'a' and 'b' are the same"]),
    (
        {"variables": {"lora_attn_modules": [["q_proj", "v_proj"], ["v_proj", "q_proj"]]}},
        ["'lora_attn_modules=q_proj+v_proj' and 'lora_attn_modules=v_proj+q_proj' are the same"],
    ),
    ({"variables": {"max_samples": [0]}}, ["variables.max_samples.0", "0", "greater than or equal to 1"]),
    (
        {"variables": {"train": ["hf://x"]}},
        ["variables.train.0", "'hf://x'", "a local file, or hf://datasets/org/name"],
    ),
    ({"variables": {"train_data": ["t"]}}, ["variables.train_data", "did you mean 'train'"]),
    ({"variables": {"data": ["short"]}}, ["variables.data.0", "'short'", "a name, described by data.sets"]),
    ({**sets("short", "long"), "variables": {"data": ["shrt"]}}, ["variables.data.0", "did you mean 'short'", "long"]),
    ({**sets("a"), "variables": {"data": ["a", None]}}, ["variables.data.1", "None is invalid", "Expected: a"]),
    ({**sets("a"), "runs": [{"name": "x", "data": ["a"]}]}, ["runs.0.data", "['a'] is invalid"]),
    ({**sets("a"), **draw(data=["a", "b"])}, ["sample.space.data.1", "'b' is invalid", "Expected: a"]),
    ({**sets("a", "b"), "variables": {"data": ["a"]}}, ["data.sets.b: no point has this data", "[a, b]", "data: b"]),
    (
        {**sets("a", "b"), "variables": {"data": ["a", "b"]}, "exclude": ["data == 'b'"]},
        ["data.sets.b: no point has this data"],
    ),
    (
        {**sets("a"), "variables": {"data": ["a"], "train": ["t", "u"]}},
        ["variables.train: 't' contradicts data: a, which has data.sets.a.train", "data or train, not both"],
    ),
    (
        {**sets("a"), "runs": [{"name": "x", "data": "a", "train": "t"}]},
        ["runs.0.train: 't' contradicts data: a", "data or train, not both"],
    ),
    ({"data": {"sets": {"a": {"trian": "t"}}}}, ["'data.sets.a.trian'", "did you mean 'train'"]),
    ({"data": {"sets": {"a": {"sets": {}}}}}, ["'data.sets.a.sets'"]),
    ({"data": {"sets": {"a": {"max_samples": "1"}}}}, ["data.sets.a.max_samples: '1' is invalid"]),
    ({"data": {"sets": {"a/b": {"max_samples": 1}}}}, ["data.sets.a/b", "a name of letters"]),
    ({"variables": {"model.path": ["a", "b"]}}, ["unknown key 'model.path' (did you mean 'model'?)"]),
    ({"variables": {"controls.lr": [1e-4]}}, ["unknown key 'controls.lr' (did you mean 'lr'?)"]),
    (
        {"variables": {"lora_alpha": ["${lora_rank}"]}},
        ["'lora_rank' not found (key: variables.lora_alpha[0])", "only in 'controls' and runs"],
    ),
    ({"controls": {"lora_alpha": "${lora_rnk}"}}, ["'lora_rnk' not found (did you mean 'lora_rank'?)", "lora_alpha"]),
    ({"controls": {"lr": "${controls.no}"}}, ["Interpolation key 'controls.no' not found", "key: controls.lr"]),
    (
        {"controls": {"lora_rank": "${lora_alpha}", "lora_alpha": "${lora_rank}"}, "variables": {"seed": [0]}},
        ["controls.lora_", "is made of itself"],
    ),
    ({"runs": [{"name": "a", "lora_rank": "${lora_rank}"}]}, ["runs.0.lora_rank", "'${lora_rank}' is made of itself"]),
    (
        {"controls": {"epochs": "${lora_rank}"}, "variables": {"lora_rank": [1]}, "exclude": ["epochs > 1"]},
        ["exclude.0", "excludes no point"],
    ),
    (
        {"controls": {"lora_alpha": "${lora_dropout}"}, "variables": {"seed": [0]}},
        ["controls.lora_alpha (${lora_dropout}): 0 is invalid", "a finite number above 0, r, or 2r"],
    ),
]


@pytest.mark.parametrize(("sections", "said"), BAD, ids=[str(sections) for sections, _ in BAD])
def test_bad_points_are_refused(sections: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(InputError) as error:
        expand(**sections)
    for part in ["my.yaml", *said]:
        assert part in str(error.value)


UNSAFE = ["a/b", "..", "a..b", "a b", "a'b", 'a"b', "a;b", "$(touch x)", "`x`", "{point}", "a\nb", "", "-n", "é", "a*b"]


@pytest.mark.parametrize("name", UNSAFE)
def test_a_run_name_that_is_unsafe_in_paths_or_shells_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"runs\.0\.name"):
        expand(runs=[{"name": name, "lora_rank": 4}])


@pytest.fixture
def adapter(tmp_path: Path) -> str:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_text("{}")
    return str(tmp_path)


def test_a_run_with_an_adapter_has_no_settings_of_a_training(adapter: str) -> None:
    point = expand(runs=[{"name": "theirs", "adapter": adapter, "merge_adapters": False}])["theirs"]
    assert point.adapter == adapter
    assert point.mode == "B2"
    assert point.settings == {"adapter": adapter, "mode": "B2"}
    assert expand(runs=[{"name": "asked", "adapter": adapter, "prompt": "Say {input}"}])["asked"].data.prompt


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"lr": 1e-3}, r"runs\.0\.lr: is a training setting"),
        ({"_override": {"a": 1}}, r"runs\.0\._override: is a training setting"),
        ({"adapter": 3}, r"runs\.0\.adapter: 3 is invalid. Expected: the path of a directory"),
        ({"adapter": "no/such"}, r"runs\.0\.adapter: no adapter_config\.json in 'no/such'"),
        ({"adapter": "a*b"}, r"runs\.0\.adapter: 'a\*b' is invalid"),
    ],
)
def test_what_is_no_adapter_or_is_to_train_one_is_refused(adapter: str, run: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        expand(runs=[{"name": "theirs", "adapter": adapter, **run}])


def test_the_same_adapter_in_the_same_mode_is_one_point(adapter: str) -> None:
    with pytest.raises(InputError, match="'a' and 'b' are the same"):
        expand(runs=[{"name": "a", "adapter": adapter}, {"name": "b", "adapter": adapter}])
    assert (
        len(expand(runs=[{"name": n, "adapter": adapter, "merge_adapters": m} for n, m in (("a", True), ("b", False))]))
        == 2
    )


def read_baselines(**evaluation: Any) -> dict[str, str]:
    config = {"experiment": {"name": "x"}, "model": {"path": "m"}, "evaluation": evaluation}
    experiment = load_experiment(config, "my.yaml")
    point = Point("lora_rank=8", (), experiment.controls, "B1", experiment.choose_model(None))
    return {name: baseline.model.path for name, baseline in get_baselines(experiment, {point.name: point}).items()}


def test_any_number_of_models_can_be_evaluated_as_they_are() -> None:
    others = [{"name": "larger", "model": "models/larger/"}, {"name": "theirs", "model": "t"}]
    assert read_baselines() == {"baseline": "m"}
    assert read_baselines(baselines=others) == {"baseline": "m", "larger": "models/larger", "theirs": "t"}
    assert read_baselines(baselines=others, baseline=False, base_model="b") == {
        "larger": "models/larger",
        "theirs": "t",
    }
    assert read_baselines(baselines=others, enabled=False) == {}


def test_a_given_template_is_that_of_base_models_alone() -> None:
    sections = {**models("a", chat_template="a.jinja"), "runs": [{"name": "r", "model": "a"}]}
    sections["model"]["chat_template"] = "all.jinja"
    sections["evaluation"] = {"baselines": [{"name": "other", "model": "m"}]}
    experiment = load_experiment({"experiment": {"name": "x"}, **sections}, "my.yaml")
    baselines = get_baselines(experiment, expand(**sections))
    assert {name: baseline.model.chat_template for name, baseline in baselines.items()} == {
        "baseline__model=a": "a.jinja",
        "other": None,
    }


@pytest.mark.parametrize("name", ["lora_rank=8", "baseline", "baseline__model=a", "results.csv", "a", "n" * 200])
def test_a_baseline_has_a_name_of_its_own(name: str) -> None:
    with pytest.raises(InputError, match=r"evaluation\.baselines\.1\.name: .* is invalid"):
        read_baselines(baselines=[{"name": "a", "model": "m"}, {"name": name, "model": "m"}])


def test_baselines_alone_are_something_to_run() -> None:
    evaluation = {"baselines": [{"name": "theirs", "model": "m"}]}
    assert expand(evaluation=evaluation) == {}
    with pytest.raises(InputError, match="nothing to run"):
        expand(evaluation={**evaluation, "enabled": False})


THREE_EPOCHS: dict[str, Any] = {"variables": {"lora_rank": [4, 8]}, "controls": {"epochs": 3}}


class TestEpochs:
    def expand(self, epochs: Any, **sections: Any) -> dict[str, Point]:
        return expand(**{**THREE_EPOCHS, "evaluation": {"epochs": epochs}, **sections})

    def test_each_epoch_that_is_wanted_is_a_point_after_the_one_that_is_trained(self) -> None:
        points = self.expand("all")
        assert list(points)[:3] == ["lora_rank=4", "lora_rank=4__epoch=1", "lora_rank=4__epoch=2"]
        assert [(p.epoch, p.is_trained) for p in list(points.values())[:3]] == [(None, True), (1, False), (2, False)]

    def test_the_last_epoch_is_the_point_as_ever(self) -> None:
        assert self.expand("last") == self.expand([3]) == expand(**THREE_EPOCHS)

    def test_a_last_epoch_that_is_not_listed_is_not_evaluated(self) -> None:
        assert {name: point.is_evaluated for name, point in self.expand([2]).items()} == {
            "lora_rank=4": False,
            "lora_rank=4__epoch=2": True,
            "lora_rank=8": False,
            "lora_rank=8__epoch=2": True,
        }

    def test_a_training_of_fewer_epochs_keeps_those_that_it_has(self) -> None:
        points = self.expand([1, 3], variables={"epochs": [1, 3]})
        assert list(points) == ["epochs=1", "epochs=3", "epochs=3__epoch=1"]
        assert all(point.is_evaluated for point in points.values())

    def test_an_epoch_is_named_by_what_its_training_is_called_already(self, registry: Path) -> None:
        run(registry, **THREE_EPOCHS, evaluation={"epochs": "all"})
        sections = {"variables": {"seed": [0]}, "controls": {"epochs": 3, "lora_rank": 8}}
        points = expand(registry, **sections, evaluation={"epochs": [1]})
        assert list(points) == ["lora_rank=8", "lora_rank=8__epoch=1"]

    @pytest.mark.parametrize(
        ("epochs", "message"),
        [
            (
                [1, 4],
                "evaluation.epochs: 4 is invalid: no point is trained for that many epochs. Expected: last, all",
            ),
            ([0], "evaluation.epochs"),
            ([], "evaluation.epochs"),
            (
                [1, 1],
                r"evaluation\.epochs: \[1, 1\] is invalid. Expected: 'last', 'all', 'best', or a list of distinct",
            ),
            ("first", "evaluation.epochs"),
            (True, "evaluation.epochs"),
            (3, "^my.yaml: evaluation.epochs: 3 is invalid. Expected: 'last', 'all', 'best', or a list .*$"),
            (
                {"best": "match/accuracy"},
                r"evaluation\.epochs: {'best': 'match/accuracy'} is invalid. Expected: 'best' .*validation_task",
            ),
            ("best", r"evaluation\.epochs: 'best' is invalid without data\.validation \(point 'lora_rank=4'\)"),
        ],
    )
    def test_what_no_training_has_is_refused(self, epochs: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            self.expand(epochs)

    def test_a_training_of_which_no_epoch_would_be_evaluated_is_refused(self) -> None:
        with pytest.raises(
            InputError, match=r"evaluation\.epochs: \[3, 4\] has no epoch of 'epochs=2', which is trained for 2"
        ):
            self.expand([4, 3], variables={"epochs": [2, 4]})

    def test_the_best_epoch_is_the_point_as_ever_and_is_evaluated(self) -> None:
        best = self.expand("best", data={"validation": "v.jsonl"})
        assert best == self.expand("last", data={"validation": "v.jsonl"})
        assert [(point.epoch, point.is_evaluated) for point in best.values()] == [(None, True)] * 2

    def test_patience_is_of_the_best_epoch_alone(self) -> None:
        sections = {"controls": {"epochs": 3}, "data": {"validation": "v.jsonl"}}
        points = self.expand("best", variables={"patience": [None, 1]}, **sections)
        assert list(points) == ["patience=null", "patience=1"]
        for epochs in ("last", "all", [1]):
            with pytest.raises(InputError, match=r"controls\.patience: 1 is invalid without evaluation\.epochs: best"):
                self.expand(epochs, variables={"patience": [None, 1]}, **sections)
        with pytest.raises(InputError, match=r"controls\.patience: 0 is invalid"):
            self.expand("best", controls={"patience": 0}, data={"validation": "v.jsonl"})

    def test_an_epoch_that_a_task_chooses_needs_no_validation_data_and_has_no_patience(self) -> None:
        chosen = {"epochs": "best", "validation_task": "package/dev"}
        points = expand(**THREE_EPOCHS, evaluation=chosen)
        assert points == self.expand("last")
        message = r"controls\.patience: 1 does not go with evaluation\.validation_task \(point 'lora_rank=4'\)"
        with pytest.raises(InputError, match=message):
            expand(**THREE_EPOCHS | {"controls": {"epochs": 3, "patience": 1}}, evaluation=chosen)
        for epochs in ("last", "all", [1]):
            message = r"evaluation\.validation_task: does not go with evaluation\.epochs: .* Expected: .*epochs: best"
            with pytest.raises(InputError, match=message):
                self.expand(epochs, evaluation=chosen | {"epochs": epochs})

    def test_a_run_with_the_name_of_an_epoch_is_refused(self) -> None:
        with pytest.raises(InputError, match="two points are named 'a__epoch=1'"):
            self.expand("all", runs=[{"name": "a", "seed": 1}, {"name": "a__epoch=1", "seed": 2}])


def test_one_gpu_is_said_in_no_setting_unless_it_varies(registry: Path) -> None:
    before = run(registry, variables={"lora_rank": [8]})
    assert "gpus" not in before["lora_rank=8"].settings
    points = run(registry, variables={"lora_rank": [8], "gpus": [1, 2]})
    # The point with one is the one that there was.
    assert list(points) == ["lora_rank=8", "gpus=2__lora_rank=8"]
    assert [point.settings["gpus"] for point in points.values()] == [1, 2]
    with pytest.raises(InputError, match="'lora_rank=8' and 'again' are the same"):
        expand(variables={"lora_rank": [8]}, runs=[{"name": "again", "lora_rank": 8, "gpus": 1}])
