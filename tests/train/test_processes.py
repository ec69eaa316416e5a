"""A training in two processes on a CPU: the adapter of one process, and its log, its failures and its resume."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import forked_training
from lorasweep.trainers.training_log import Row, read_log
from recipes import write_long_answers

ROOT = Path(__file__).parents[2]

# Six steps an epoch, of batches of four samples in all; one sample is left over.
CONTROLS = {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 1, "lora_dropout": 0.0, "num_warmup_steps": 3}

Make = Callable[..., Path]


def train(recipe: Path, happens: str = "", save_every: int = 1000) -> subprocess.CompletedProcess[str]:
    """Run a recipe as a job does; `happens` is `WHAT:RANK:STEP`."""
    return forked_training.call("lorasweep", get_arguments(recipe), get_environment(recipe, happens, save_every))


def get_arguments(recipe: Path) -> list[str | Path]:
    return ["job", "train", "--recipe", recipe, "--adapter", recipe.parent / "adapter"]


def get_environment(recipe: Path, happens: str = "", save_every: int = 1000) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'workflow'}:{ROOT / 'tests'}",
        "LORASWEEP_SAVE_EVERY": str(save_every),
        "LORASWEEP_RECIPE": str(recipe),
        **({"LORASWEEP_HAPPENS": happens} if happens else {}),
    }


def run(recipe: Path) -> None:
    done = train(recipe)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(recipe: Path) -> dict[str, torch.Tensor]:
    return load_file(recipe.parent / "adapter/adapter_model.safetensors")


def log(recipe: Path) -> list[Row]:
    return [replace(row, seconds=0) for row in read_log(recipe.parent / "adapter/training_log.csv")]


def record(recipe: Path) -> dict[str, Any]:
    return dict(json.loads((recipe.parent / "adapter/lorasweep.json").read_text()))


@pytest.fixture(scope="module")
def make_point(
    make_in: Make, write_samples: Callable[[Path, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Write a recipe whose builder begins with the same adapter in however many processes."""
    folder = tmp_path_factory.mktemp("processes")
    held_out = write_samples(folder / "validation.jsonl", "acegikm")

    def make(point: str, **controls: Any) -> Path:
        recipe = make_in(folder, point, **{"data": {"validation": str(held_out)}, **CONTROLS, **controls})
        recipe.write_text(
            recipe.read_text().replace("torchtune.models.llama3.lora_llama3", "processes_of_training.build")
        )
        return recipe

    return make


@pytest.fixture(scope="module")
def two(make_point: Make) -> Path:
    """Trained by processes that are started as a job's are, without a fork."""
    recipe = make_point("two", gpus=2)
    command = [sys.executable, "-m", "lorasweep", *get_arguments(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=get_environment(recipe), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return recipe


def test_it_is_the_training_of_one_process_with_the_same_effective_batch(two: Path, make_point: Make) -> None:
    one = make_point("one", batch_size=4)
    run(one)
    assert "\nnproc_per_node: 2\n" in two.read_text()
    assert "nproc_per_node" not in one.read_text()
    assert weights(two).keys() == weights(one).keys()
    for name, tensor in weights(two).items():
        torch.testing.assert_close(
            tensor, weights(one)[name], rtol=1e-3, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}"
        )
    assert max(float(tensor.abs().max()) for name, tensor in weights(two).items() if "lora_B" in name) > 1e-3
    # Rows are rounded to six digits; sums are taken in another order.
    for ours, theirs in zip(log(two), log(one), strict=True):
        assert (ours.step, ours.epoch, ours.lr, ours.tokens) == (theirs.step, theirs.epoch, theirs.lr, theirs.tokens)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert (ours.validation_loss is None) == (theirs.validation_loss is None) == (ours.step % 6 != 0)
        assert ours.validation_loss is None or ours.validation_loss == pytest.approx(theirs.validation_loss, rel=1e-4)
    assert [row.step for row in log(two)] == list(range(1, 13))
    assert not (two.parent / "state/train").exists()


def test_one_that_is_told_to_stop_and_one_that_loses_a_process_go_on_bit_for_bit(make_point: Make) -> None:
    undisturbed, recipe = (make_point(name, gpus=2, lora_dropout=0.1) for name in ("undisturbed", "disturbed"))
    run(undisturbed)
    told = train(recipe, "tell:1:2")
    assert told.returncode == 1
    assert "train: told to stop (SIGTERM); step 3 is saved, and the next run resumes from it" in told.stderr
    told = train(recipe, "tell while loading:1:0")
    assert told.stderr.splitlines()[-1] == (
        "train: told to stop (SIGTERM); the next run resumes from the last saved state"
    )
    assert not (recipe.parent / "state/train.attempt.json").exists()
    lost = train(recipe, "kill:1:8", save_every=4)
    assert lost.returncode == 1
    assert "Resuming after step 3," in lost.stdout
    assert "process 1 terminated with signal SIGKILL" in lost.stderr.splitlines()[-1]
    # It cannot say why: whether for its memory, the next attempt asks.
    assert (recipe.parent / "state/train.attempt.json").exists()
    assert not (recipe.parent / "adapter").exists()
    done = train(recipe)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resuming after step 8," in done.stdout
    assert log(recipe) == log(undisturbed)
    ours, theirs = ((r.parent / "adapter/adapter_model.safetensors").read_bytes() for r in (recipe, undisturbed))
    assert ours == theirs


def test_a_device_that_runs_out_of_memory_has_all_of_them_take_half_the_batch(two: Path, make_point: Make) -> None:
    recipe = make_point("halved", gpus=2)
    assert "train: CUDA out of memory; batch_size 2 is too large: the next attempt halves it" in (
        train(recipe, "run out:1:2").stderr
    )
    run(recipe)
    assert record(recipe)["batch_size_used"] == 1
    for name, tensor in weights(two).items():
        torch.testing.assert_close(weights(recipe)[name], tensor, rtol=1e-3, atol=1e-5)


def test_all_of_them_stop_out_of_patience(make_point: Make, tmp_path: Path) -> None:
    held_out = write_long_answers(tmp_path / "held_out.jsonl")
    best = {"keeps_best_epoch": True, "patience": 1, "epochs": 9, "lr": 3e-2, "data": {"validation": str(held_out)}}
    recipe = make_point("patient", gpus=2, **best)
    assert train(recipe, "tell:1:2").returncode == 1
    run(recipe)
    losses = {row.epoch: row.validation_loss for row in log(recipe) if row.validation_loss is not None}
    chosen = min(losses, key=losses.__getitem__)
    assert len(losses) == chosen + 1 < 9
    assert record(recipe)["best_epoch"] == {
        "epoch": chosen,
        "validation_loss": losses[chosen],
        "epochs_trained": chosen + 1,
    }


def test_a_loss_that_is_not_finite_ends_all_of_them_at_that_step(make_point: Make) -> None:
    recipe = make_point("diverged", gpus=2, lr=1e30, num_warmup_steps=0)
    done = train(recipe)
    assert done.returncode == 1
    assert "train: the training diverged: the loss of step 2 is" in done.stderr.splitlines()[-1]
    assert not (recipe.parent / "adapter").exists()
    assert [row.step for row in read_log(recipe.parent / "state/train/training_log.csv")] == [1]
    # Of other users' processes the environment cannot be read.
    environments = [process.info["environ"] or {} for process in psutil.process_iter(["environ"])]
    assert not [environment for environment in environments if environment.get("LORASWEEP_RECIPE") == str(recipe)]
