"""A training that is interrupted goes on, and ends bit for bit as one that was not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from interrupted_training import train_and_end
from lorasweep.trainers.saved_states import SavedStates
from lorasweep.trainers.training_log import Row, read_log

# Six steps an epoch, and one batch that is left over.
CONTROLS = {"epochs": 2, "batch_size": 1, "gradient_accumulation_steps": 4, "num_warmup_steps": 3}
STEPS = 12

KILLED = -9

Make = Callable[..., Path]
Writer = Callable[[Path, str], Path]


def read(recipe: Path) -> tuple[bytes, list[Row]]:
    """The weights, and the log less its times."""
    adapter = recipe.parent / "adapter"
    rows = read_log(adapter / "training_log.csv")
    return (adapter / "adapter_model.safetensors").read_bytes(), [replace(row, seconds=0) for row in rows]


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


def states(recipe: Path) -> list[Path]:
    return sorted((recipe.parent / "state/train/saved").glob("step-*.pt"))


@pytest.fixture(scope="module")
def undisturbed(make_in: Make, write_samples: Writer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    held_out = write_samples(folder / "validation.jsonl", "aceg")
    recipe = make_in(folder, data={"validation": str(held_out)}, **CONTROLS)
    assert train_and_end(recipe, save_every=100) == 0
    return recipe


@pytest.fixture
def recipe(undisturbed: Path, tmp_path: Path) -> Path:
    """The same recipe, in a point's folder of its own."""
    file = tmp_path / "sweep/trainings/point/recipe.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(undisturbed.read_text().replace(str(undisturbed.parent), str(file.parent)))
    return file


@pytest.mark.parametrize(
    ("happens", "step", "save_every", "goes_on_after"),
    [
        ("killed in a step", 0, 1, 0),
        ("killed in a step", 4, 1, 4),
        ("killed in a step", 5, 3, 3),
        ("killed before it is saved", 4, 2, 2),
        ("killed while a state is written", 3, 1, 2),
        ("killed while a state is written", 1, 1, 0),
        ("killed in a step", 6, 2, 6),
        ("killed at the end of an epoch", 0, 6, 6),
        ("killed in a step", 9, 4, 8),
        ("killed at the end of an epoch", 1, 5, 10),
    ],
)
def test_a_killed_training_ends_as_if_it_had_not_been(
    undisturbed: Path, recipe: Path, happens: str, step: int, save_every: int, goes_on_after: int
) -> None:
    assert train_and_end(recipe, save_every, happens, step) == KILLED
    assert not (recipe.parent / "adapter").exists()
    assert train_and_end(recipe, save_every) == 0
    assert read(recipe) == read(undisturbed)
    assert (f"Resuming after step {goes_on_after}," in said(recipe)) == (goes_on_after > 0)
    assert not (recipe.parent / "state/train").exists()


def test_one_that_is_killed_again_and_again_ends_as_if_it_had_not_been(undisturbed: Path, recipe: Path) -> None:
    for step in (1, 2, 5, 6, 7, 11):
        assert train_and_end(recipe, 1, "killed in a step", step) == KILLED
        assert len(states(recipe)) == min(step, 2)
    assert train_and_end(recipe) == 0
    assert read(recipe) == read(undisturbed)
    seconds = [row.seconds for row in read_log(recipe.parent / "adapter/training_log.csv")]
    assert seconds == sorted(seconds)


def get_earlier(recipe: Path) -> dict[int, Path]:
    return {1: recipe.parent / "first", 2: recipe.parent / "second"}


def read_earlier(recipe: Path) -> list[bytes]:
    return [(folder / "adapter_model.safetensors").read_bytes() for folder in get_earlier(recipe).values()]


@pytest.mark.parametrize(("happens", "step"), [("killed in a step", 6), ("killed at the end of an epoch", 1)])
def test_earlier_epochs_are_as_of_one_that_was_not_killed(make: Make, happens: str, step: int) -> None:
    whole, killed = (make(point, **{**CONTROLS, "epochs": 3}) for point in ("whole", "killed"))
    assert train_and_end(whole, earlier=get_earlier(whole)) == 0
    assert train_and_end(killed, 1, happens, step, earlier=get_earlier(killed)) == KILLED
    assert train_and_end(killed, earlier=get_earlier(killed)) == 0
    assert "Resuming after step" in said(killed)
    assert read_earlier(killed) == read_earlier(whole)


def test_an_earlier_epoch_that_is_torn_trains_anew(make: Make) -> None:
    whole, killed = (make(point, **{**CONTROLS, "epochs": 3}) for point in ("whole", "killed"))
    assert train_and_end(whole, earlier=get_earlier(whole)) == 0
    assert train_and_end(killed, 1, "killed at the end of an epoch", 2, earlier=get_earlier(killed)) == KILLED
    cut(killed.parent / "state/train/epoch_0/adapter_model.safetensors")
    assert train_and_end(killed, 1, earlier=get_earlier(killed)) == 1
    assert "epoch_0/adapter_model.safetensors: cannot be read" in said(killed)
    assert train_and_end(killed, 1, earlier=get_earlier(killed)) == 0
    assert read_earlier(killed) == read_earlier(whole)


def test_where_epochs_end_early_it_goes_on_as_well(make: Make) -> None:
    whole, killed = (make(point, max_steps_per_epoch=4, **CONTROLS) for point in ("whole", "killed"))
    assert train_and_end(whole) == 0
    for step in (3, 4, 6):
        assert train_and_end(killed, 1, "killed in a step", step) == KILLED
    assert train_and_end(killed) == 0
    assert read(killed) == read(whole)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, empty, change])
@pytest.mark.parametrize("spoilt", [1, 2])
def test_a_torn_state_is_not_taken_but_the_one_before_it_or_none(
    undisturbed: Path, recipe: Path, spoil: Callable[[Path], None], spoilt: int
) -> None:
    assert train_and_end(recipe, 1, "killed in a step", 8) == KILLED
    for file in states(recipe)[-spoilt:]:
        spoil(file)
    assert train_and_end(recipe, 1, "killed in a step", 9) == KILLED
    assert said(recipe).count("is damaged; it is not used") == spoilt
    assert ("Resuming after step 7," in said(recipe)) == (spoilt == 1)
    assert train_and_end(recipe) == 0
    assert read(recipe) == read(undisturbed)


def test_a_state_of_an_8_bit_optimizer_is_read_where_its_package_is_not_imported_yet(tmp_path: Path) -> None:
    from torchao.optim.subclass_8bit import OptimState8bit

    moments = OptimState8bit.zeros((4, 256), signed=True, block_size=256, device="cpu")
    states = SavedStates(tmp_path, {"recipe_sha256": "1"})
    states.save(1, {"moments": moments})
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # the import of the package adds its classes
    try:
        loaded = states.load()
    finally:
        torch.serialization.add_safe_globals(known)
    assert loaded
    assert torch.equal(loaded["moments"].dequantize(), moments.dequantize())


@pytest.mark.parametrize("changes", ["recipe", "base"])
def test_a_state_of_another_recipe_or_base_is_dropped(
    make: Make, recipe: Path, model: Path, tmp_path: Path, changes: str
) -> None:
    assert train_and_end(recipe, 1, "killed in a step", 5) == KILLED
    text = recipe.read_text()
    if changes == "recipe":
        recipe.write_text(text.replace("seed: 0", "seed: 1"))
    else:
        other = tmp_path / "other"
        shutil.copytree(model, other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))
        # The text of the recipe stays: what lies at the path is another model.
        recipe.write_text(text.replace(str(model), str(other)))
        assert train_and_end(recipe, 1, "killed in a step", 5) == KILLED
        (other / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert train_and_end(recipe, 1, "killed in a step", 3) == KILLED
    assert "belongs to another recipe, base model or version; it is not used" in said(recipe)
    assert "Resuming" not in said(recipe)
    assert [file.name[:14] for file in states(recipe)] == ["step-000000002", "step-000000003"]


def test_it_saves_and_ends_when_it_is_told_to_and_its_loggers_are_told_each_step_once(
    undisturbed: Path, recipe: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options: dict[str, Any] = {"metric_loggers": ["tensorboard"]}
    assert train_and_end(recipe, 100, "told to stop", 7, **options) == 1
    assert "train: told to stop (SIGTERM); step 8 is saved, and the next run resumes from it" in said(recipe)
    assert train_and_end(recipe, 100, **options) == 0
    assert "Resuming after step 8," in said(recipe)
    assert read(recipe) == read(undisturbed)
    events = EventAccumulator(str(recipe.parents[2] / "tensorboard/point"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("loss")] == list(range(1, STEPS + 1))
