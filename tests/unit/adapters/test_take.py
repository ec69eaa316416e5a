"""What a point has when it took an adapter, and what happens to other points then."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from lorasweep.adapters.take import take_adapter
from lorasweep.util.errors import InputError

WEIGHTS = "adapter_model.safetensors"
WEIGHTS_IN_IT = f"adapter/{WEIGHTS}"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    folder = tmp_path / "trainings/r=8-0123456789"
    (folder / "adapter").mkdir(parents=True)
    (folder / "state/train").mkdir(parents=True)
    for name in ("recipe.yaml", f"adapter/{WEIGHTS}", "adapter/adapter_config.json", "adapter/lorasweep.json"):
        (folder / name).write_text(name)
    record = {"adapter_sha256": hashlib.sha256(WEIGHTS_IN_IT.encode()).hexdigest()}
    (folder / "adapter/lorasweep.json").write_text(json.dumps(record))
    return folder


def take(training: Path, name: str) -> Path:
    point = training.parents[1] / name
    (point / "adapter").mkdir(parents=True, exist_ok=True)
    take_adapter(training / "adapter", training / "recipe.yaml", training / "state", point)
    return point


def test_a_point_has_all_of_it_and_the_recipe_and_nothing_of_before(training: Path) -> None:
    before = training.parents[1] / "p/adapter/before"
    before.parent.mkdir(parents=True)
    before.touch()
    point = take(training, "p")
    assert {str(path.relative_to(point)): path.read_text() for path in point.rglob("*") if path.is_file()} == {
        "recipe.yaml": "recipe.yaml",
        **{f"adapter/{name}": f"adapter/{name}" for name in (WEIGHTS, "adapter_config.json")},
        "adapter/lorasweep.json": (training / "adapter/lorasweep.json").read_text(),
    }
    assert not (training / "state").exists()


def test_the_weights_of_a_point_alone_lie_on_the_disk_once(training: Path) -> None:
    point = take(training, "p")
    assert (point / "adapter" / WEIGHTS).samefile(training / "adapter" / WEIGHTS)
    assert take(training, "p") == point
    assert (point / "adapter" / WEIGHTS).samefile(training / "adapter" / WEIGHTS)


def test_a_new_time_of_one_point_is_no_other_points(training: Path) -> None:
    points = [take(training, name) for name in ("p", "q", "r")]
    for point in points:
        for file in (point / "adapter").iterdir():
            os.utime(file, (1, 1))
        assert all(file.stat().st_mtime > 1 for other in points if other != point for file in other.rglob("*.*"))
        for file in (point / "adapter").iterdir():
            os.utime(file)
    assert all(file.stat().st_nlink == 1 for file in training.rglob("*.json"))


def test_it_is_a_copy_where_the_file_system_has_no_links(training: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    weights = take(training, "p") / "adapter" / WEIGHTS
    assert weights.read_text() == f"adapter/{WEIGHTS}"
    assert not weights.samefile(training / "adapter" / WEIGHTS)


def test_a_training_without_weights_is_named(training: Path) -> None:
    (training / "adapter" / WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"{WEIGHTS}: is missing; remove .*0123456789 and run again"):
        take(training, "p")


def test_weights_that_are_not_those_of_the_record_are_refused(training: Path) -> None:
    (training / "adapter" / WEIGHTS).write_text("others")
    with pytest.raises(
        InputError, match=r"is not what .*lorasweep.json says; remove .* and run again to train it again"
    ):
        take(training, "p")


def test_an_adapter_whose_epoch_was_chosen_otherwise_than_planned_is_not_taken(training: Path) -> None:
    """A job reads the task's file later than the run did that planned the choice."""
    file = training / "adapter/lorasweep.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"best_epoch": {"evaluation_sha256": "old"}}))
    places = (training / "adapter", training / "recipe.yaml", training / "state", training.parents[1] / "p")
    with pytest.raises(InputError, match=r"its epoch was not chosen as this run had planned"):
        take_adapter(*places, choice="new")
    assert not (places[-1] / "adapter").exists()
    take_adapter(*places, choice="old")
    assert (places[-1] / "adapter" / WEIGHTS).is_file()
