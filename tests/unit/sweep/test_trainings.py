"""Which points share a training, what it is called, and which one that is there is taken."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lorasweep.experiment.points import Point
from lorasweep.experiment.sections import Controls, Mode, Model
from lorasweep.sweep.trainings import drop_unused, is_trained, share_trainings
from lorasweep.trainers.identity import head_recipe, read_identity


def make_point(name: str, mode: Mode = "B1", rank: int = 8, epoch: int | None = None, is_run: bool = False) -> Point:
    return Point(name, (), Controls(lora_rank=rank), mode, Model(path="m"), epoch=epoch, is_run=is_run)


def share(results: Path, *points: Point) -> dict[str, Point]:
    return share_trainings({point.name: point for point in points}, lambda point: digest(str(point.controls)), results)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def leave(folder: Path, *epochs: int) -> None:
    """Leave what a training leaves."""
    for adapter in ("adapter", *(f"epoch={epoch}" for epoch in epochs)):
        (folder / adapter).mkdir(parents=True)
        for name in ("adapter_model.safetensors", "lorasweep.json"):
            (folder / adapter / name).touch()


THREE = [make_point(f"lora_rank=8__mode={mode}", mode) for mode in ("A", "B1", "B2")]


def test_points_that_are_kept_otherwise_share_a_training_that_counts_for_the_first(tmp_path: Path) -> None:
    points = share(tmp_path, *THREE, make_point("lora_rank=4", rank=4))
    assert len({point.training for point in points.values()}) == 2
    first = THREE[0].name
    assert [point.trained_by for point in points.values()] == [None, first, first, None]
    assert [point.is_trained for point in points.values()] == [True, False, False, True]


def test_for_whom_it_counts_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    assert share(tmp_path, *reversed(THREE)) == share(tmp_path, *THREE)


def test_it_is_called_by_what_its_points_have_in_common_and_by_its_recipe(tmp_path: Path) -> None:
    names = {point.training.rpartition("-")[0] for point in share(tmp_path, *THREE).values() if point.training}
    assert names == {"lora_rank=8"}
    [alone] = share(tmp_path, make_point("mode=A", "A")).values()
    assert str(alone.training).startswith("training-")
    [run] = share(tmp_path, make_point("mode=mine", is_run=True)).values()
    assert str(run.training).startswith("mode=mine-")


def test_another_recipe_is_another_training(tmp_path: Path) -> None:
    names = {share(tmp_path, make_point("p", rank=rank))["p"].training for rank in (4, 8)}
    assert len(names) == 2


def test_a_training_that_is_there_keeps_its_name_whatever_its_points_are_called_now(tmp_path: Path) -> None:
    [before] = share(tmp_path, make_point("lora_rank=8")).values()
    leave(tmp_path / "trainings" / str(before.training))
    [now] = share(tmp_path, make_point("lora_rank=8__lr=1e-4")).values()
    assert now.training == before.training


def test_fewer_epochs_are_of_the_same_training_and_more_of_another(tmp_path: Path) -> None:
    last, first, second = (make_point("p"), make_point("p__epoch=1", epoch=1), make_point("p__epoch=2", epoch=2))
    both = share(tmp_path, last, first, second)
    assert len({point.training for point in both.values()}) == 1
    assert [point.trained_by for point in both.values()] == [None, "p", "p"]
    name = both["p"].training
    leave(tmp_path / "trainings" / str(name), 1, 2)
    assert share(tmp_path, last)["p"].training == share(tmp_path, last, second)["p"].training == name
    third = make_point("p__epoch=3", epoch=3)
    assert share(tmp_path, last, first, third)["p"].training != name


def test_one_that_lost_an_epoch_is_trained_in_its_own_folder(tmp_path: Path) -> None:
    points = (make_point("p"), make_point("p__epoch=1", epoch=1))
    name = share(tmp_path, *points)["p"].training
    leave(tmp_path / "trainings" / str(name))
    assert share(tmp_path, *points)["p"].training == name


def test_earlier_epochs_are_of_the_training_of_all_modes(tmp_path: Path) -> None:
    earlier = [replace(point, name=f"{point.name}__epoch=1", epoch=1) for point in THREE]
    points = share(tmp_path, *THREE, *earlier)
    assert len({point.training for point in points.values()}) == 1
    assert {point.trained_by for point in points.values()} == {None, THREE[0].name}


def test_a_recipe_says_of_which_training_it_is(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(head_recipe("lr: 1\n", digest("it")))
    assert read_identity(recipe) == digest("it")
    assert yaml.safe_load(recipe.read_text()) == {"lr": 1}
    recipe.write_text("lr: 1\n")
    assert read_identity(recipe) is None


def test_an_adapter_that_is_given_has_no_training(tmp_path: Path) -> None:
    given = replace(make_point("given"), adapter="elsewhere")
    assert share(tmp_path, given) == {"given": given}


@pytest.mark.parametrize("missing", ["adapter/lorasweep.json", "epoch=1/adapter_model.safetensors"])
def test_it_is_done_when_all_of_its_adapters_are_whole(tmp_path: Path, missing: str) -> None:
    leave(tmp_path, 1)
    assert is_trained(tmp_path, [1])
    (tmp_path / missing).unlink()
    assert not is_trained(tmp_path, [1])


def test_what_no_point_has_of_a_training_that_left_is_removed(tmp_path: Path) -> None:
    for name in ("now-0123456789", "taken-0123456780", "left-0123456781-00ff", "theirs"):
        leave(tmp_path / "trainings" / name)
        (tmp_path / "trainings" / name / "state/train").mkdir(parents=True)
        (tmp_path / "trainings" / name / "recipe.yaml").write_text(name)
    (tmp_path / "point").mkdir()
    (tmp_path / "point/recipe.yaml").write_text("taken-0123456780")
    drop_unused(tmp_path / "trainings", ["now-0123456789"])
    left = {folder.name: (folder / "state").exists() for folder in (tmp_path / "trainings").iterdir()}
    assert left == {"now-0123456789": True, "taken-0123456780": False, "theirs": True}
    drop_unused(tmp_path / "none", [])
