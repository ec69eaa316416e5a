"""Which settings go on, and what `prune` does not go with."""

import random
import re
from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import Point, get_points
from lorasweep.experiment.pruning import (
    Candidate,
    Verdict,
    check_pruning,
    count_kept,
    decide,
    expect_shares,
    get_rivals_key,
    get_setting_key,
)
from lorasweep.experiment.sections import Experiment, Prune
from lorasweep.util.errors import InputError, naming_file

PRUNE = {"after": [1, 2]}


def make(**sections: Any) -> tuple[Experiment, dict[str, Point]]:
    config = {
        "experiment": {"name": "x"},
        "model": {"path": "m"},
        "data": {"train": "t", "validation": "v"},
        "controls": {"epochs": 4},
        "prune": PRUNE,
        **sections,
    }
    with naming_file("my.yaml"):
        experiment = load_experiment(config, "my.yaml")
        return experiment, get_points(experiment, Path("none.json"))


def judge(candidates: list[Candidate], keep: float, *, higher: bool = False) -> dict[str, Verdict]:
    verdicts = decide(candidates, keep, higher_is_better=higher)
    assert verdicts is not None
    return verdicts


def stay(numbers: dict[str, float | None], keep: float = 0.5, *, higher: bool = False, diverged: str = "") -> set[str]:
    """The trainings that go on; a name is `rivals/setting/seed`."""
    candidates = [
        Candidate(name, name.rpartition("/")[0], name.partition("/")[0], number, has_diverged=name in diverged.split())
        for name, number in numbers.items()
    ]
    verdicts = [judge(each, keep, higher=higher) for each in (candidates, candidates[::-1])]
    assert list(verdicts[0].items()) == list(verdicts[1].items())
    return {name for name, verdict in verdicts[0].items() if verdict.stays}


def test_the_better_half_goes_on() -> None:
    losses: dict[str, float | None] = {"m/a/0": 0.4, "m/b/0": 0.2, "m/c/0": 0.3, "m/d/0": 0.1}
    assert stay(losses) == {"m/b/0", "m/d/0"}
    assert stay(losses, higher=True) == {"m/a/0", "m/c/0"}
    assert stay(losses, keep=1.0) == {*losses}
    assert stay(losses, keep=0.01) == {"m/d/0"}


def test_what_is_kept_is_rounded_up_and_never_none() -> None:
    assert [count_kept(number, 0.5) for number in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert count_kept(10, 0.7) == 7
    assert count_kept(100, 0.001) == 1


def test_a_tie_at_the_border_goes_on() -> None:
    assert stay({"m/a/0": 0.1, "m/b/0": 0.2, "m/c/0": 0.2, "m/d/0": 0.3}) == {"m/a/0", "m/b/0", "m/c/0"}
    assert stay({"m/a/0": 0.2, "m/b/0": 0.2}, keep=0.1) == {"m/a/0", "m/b/0"}


def test_replicates_are_judged_together_by_their_mean() -> None:
    losses: dict[str, float | None] = {"m/a/0": 0.1, "m/a/1": 0.5, "m/b/0": 0.2, "m/b/1": 0.3}
    assert stay(losses) == {"m/b/0", "m/b/1"}
    candidates = [Candidate(name, name[:3], "m", number) for name, number in losses.items()]
    verdict = judge(candidates, 0.5)["m/a/1"]
    assert (verdict.number, verdict.seeds, verdict.rank, verdict.rivals, verdict.kept) == (0.3, 2, 2, 2, 1)


def test_the_decision_does_not_depend_on_the_order_of_seeds() -> None:
    draw = random.Random(0)
    numbers = [draw.random() for _ in range(7)]
    candidates = [Candidate(f"a{seed}", "a", "m", number) for seed, number in enumerate(numbers)]
    means = set()
    for _ in range(20):
        draw.shuffle(candidates)
        means.add(judge(candidates, 0.5)["a0"].number)
    assert len(means) == 1


def test_settings_of_several_models_are_apart() -> None:
    losses: dict[str, float | None] = {"m/a/0": 0.1, "m/b/0": 0.2, "n/a/0": 3.1, "n/b/0": 3.0}
    assert stay(losses) == {"m/a/0", "n/b/0"}


def test_a_training_that_diverged_is_behind_all_and_takes_its_replicates_with_it() -> None:
    losses: dict[str, float | None] = {"m/a/0": 0.1, "m/a/1": None, "m/b/0": 9.0, "m/c/0": 8.0, "m/d/0": 7.0}
    assert stay(losses, diverged="m/a/1") == {"m/c/0", "m/d/0"}
    assert stay(losses, keep=1.0, diverged="m/a/1") == {*losses}
    assert stay(losses, higher=True, diverged="m/a/1") == {"m/b/0", "m/c/0"}


def test_a_training_without_a_number_is_not_compared_and_stays() -> None:
    assert stay({"m/a/0": None, "m/b/0": 0.2, "m/c/0": 0.1}) == {"m/a/0", "m/c/0"}
    assert stay({"m/a/0": None}) == {"m/a/0"}


def test_a_setting_that_was_let_go_on_keeps_its_place_without_a_number() -> None:
    losses: dict[str, float | None] = {"m/a/0": None, "m/b/0": None, "m/c/0": 0.2, "m/d/0": 0.1}

    def decide_with(held: str, keep: float) -> dict[str, tuple[bool, int | None]]:
        candidates = [Candidate(name, name[:3], "m", loss, keeps_place=name in held) for name, loss in losses.items()]
        return {name[2]: (verdict.stays, verdict.rank) for name, verdict in judge(candidates, keep).items()}

    on = (True, None)
    assert decide_with("m/a/0 m/b/0", 0.5) == {"a": on, "b": on, "c": (False, 4), "d": (False, 3)}
    assert decide_with("m/a/0 m/b/0", 0.75) == {"a": on, "b": on, "c": (False, 4), "d": (True, 3)}
    assert decide_with("m/a/0", 0.5) == {"a": on, "b": on, "c": (False, 3), "d": (True, 2)}
    # A number counts more than an earlier decision.
    assert decide_with("m/c/0", 0.5) == {"a": on, "b": on, "c": (False, 2), "d": (True, 1)}


def test_a_number_is_waited_for_unless_all_places_are_kept() -> None:
    held = [Candidate(f"m/{name}/0", f"m/{name}", "m", None, keeps_place=True) for name in "ab"]
    known = Candidate("m/c/0", "m/c", "m", 0.1)
    awaited = Candidate("m/d/0", "m/d", "m", None, is_awaited=True)
    assert decide([held[0], known, awaited], 0.5, higher_is_better=False) is None
    assert decide([known, awaited], 0.5, higher_is_better=False) is None
    verdicts = judge([*held, known, awaited], 0.5)
    assert {name for name, verdict in verdicts.items() if verdict.stays} == {"m/a/0", "m/b/0"}
    assert (verdicts["m/d/0"].rank, verdicts["m/c/0"].rank) == (None, 3)
    # Those of another base model wait for nobody.
    assert decide([*held, Candidate("n/e/0", "n/e", "n", None, is_awaited=True)], 0.5, higher_is_better=False) is None


def test_seeds_are_one_setting_and_other_losses_are_no_rivals() -> None:
    experiment, points = make(
        variables={"seed": [0, 1], "lr": [1e-3, 1e-4], "mode": ["A", "B2"]},
        runs=[{"name": "other", "system_prompt": "Be brief."}, {"name": "short", "max_samples": 3}],
    )
    assert experiment.prune
    assert len({get_setting_key(point) for point in points.values()}) == 4
    by_loss = {get_rivals_key(point, experiment.prune) for point in points.values()}
    assert len(by_loss) == 2
    assert get_rivals_key(points["other"], experiment.prune) != get_rivals_key(points["short"], experiment.prune)
    by_task = Prune.model_validate({"after": [1], "by": {"task": "pkg/dev"}})
    assert len({get_rivals_key(point, by_task) for point in points.values()}) == 1


def test_half_of_half_is_expected_to_be_trained() -> None:
    experiment, points = make(variables={"lr": [1e-3, 1e-4, 1e-5, 1e-6], "seed": [0, 1]})
    assert experiment.prune
    shares = expect_shares(points, experiment.prune)
    assert len(shares) == 8
    assert {tuple(share) for share in shares.values()} == {(1.0, 0.5, 0.25)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"prune": {"after": []}}, r"prune.after: \[\] is invalid"),
    (
        {"prune": {"after": [2, 1]}},
        r"prune.after: \[2, 1\] is invalid. Expected: epochs in increasing order, each once",
    ),
    ({"prune": {"after": [1, 1]}}, r"prune.after: \[1, 1\] is invalid"),
    ({"prune": {"after": [0]}}, r"prune.after.0: 0 is invalid"),
    ({"prune": {"after": [1], "keep": 0}}, "prune.keep: 0 is invalid. Expected: greater than 0"),
    ({"prune": {"after": [1], "keep": 1.5}}, "prune.keep: 1.5 is invalid. Expected: less than or equal to 1"),
    ({"prune": {"after": [1], "by": "loss"}}, "prune.by"),
    ({"prune": {"after": [1], "kept": 0.5}}, r"unknown key 'prune.kept' \(did you mean 'keep'\?\)"),
    (
        {"prune": {"after": [4]}},
        r"prune.after: 4 is not before the last epoch of 'lr=1e-4', 'lr=1e-3' \(controls.epochs: 4\)",
    ),
    (
        {"variables": {"epochs": [2, 3, 4]}},
        r"prune.after: 2 is not before the last epoch of 'epochs=2' \(controls.epochs: 2\). Expected: epochs below 2",
    ),
    (
        {"variables": {"seed": [0, 1, 2, 3, 4]}, "controls": {"epochs": 2}},
        r"of 'seed=0', 'seed=1', 'seed=2' and 2 more \(controls.epochs: 2\)",
    ),
    (
        {"evaluation": {"epochs": "all"}},
        "prune: does not go with evaluation.epochs: all.*Expected: evaluation.epochs: last",
    ),
    ({"evaluation": {"epochs": "best"}}, "prune: does not go with evaluation.epochs: best"),
    ({"evaluation": {"epochs": [4]}}, r"prune: does not go with evaluation.epochs: \[4\]"),
    ({"data": {"train": "t"}}, r"prune.by: 'validation_loss' is invalid without data.validation \(point 'lr=1e-4'\)"),
]


@pytest.mark.parametrize(("sections", "said"), REFUSED)
def test_what_prune_does_not_go_with_is_refused_by_its_key(sections: dict[str, Any], said: str) -> None:
    def check() -> None:
        experiment, points = make(**{"variables": {"lr": [1e-4, 1e-3]}, **sections})
        check_pruning(experiment, points.values())

    with pytest.raises(InputError) as refused:
        check()
    assert re.search(said, str(refused.value).replace("\n", " "))


def test_an_existing_adapter_has_no_epochs_that_could_be_too_few(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    experiment, points = make(
        variables={"epochs": [3, 4]}, controls={"epochs": 1}, runs=[{"name": "given", "adapter": str(tmp_path)}]
    )
    check_pruning(experiment, points.values())


def test_a_task_needs_no_validation_data() -> None:
    by = {"task": "pkg/dev", "metric": "match/accuracy", "higher_is_better": False}
    experiment, points = make(data={"train": "t"}, variables={"lr": [1e-3]}, prune={"after": [1], "by": by})
    check_pruning(experiment, points.values())
    assert experiment.prune
    assert not experiment.prune.higher_is_better
