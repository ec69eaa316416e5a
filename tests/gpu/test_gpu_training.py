"""Training on a GPU: it learns, goes on bit for bit after it was told to stop, and takes less when memory runs out."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import interrupted_training
from lorasweep.trainers.training_log import Row, read_log
from recipes import write_recipe, write_samples

ROOT = Path(__file__).parents[2]

train_and_end = partial(interrupted_training.train_and_end, processes=multiprocessing.get_context("spawn"))

CONTROLS = {"epochs": 2, "batch_size": 2, "gradient_accumulation_steps": 2, "lr": 2e-3, "apply_lora_to_mlp": True}
STEPS = 12

# In fp32 the kernels of attention add in any order: two trainings without this differ in the last bits.
DETERMINISTIC = {"_override": {"cudnn_deterministic_mode": 2}}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, get_model_in: Callable[[str], Path]) -> Make:
    """Write a recipe for the GPU, of samples long enough to fill its kernels."""

    def write(
        point: str, dtype: str = "bf16", data: dict[str, Any] | None = None, words: int = 20, **controls: Any
    ) -> Path:
        samples = [{"input": f"{i} " + "after " * (words + 9 * (i % 7)), "output": f"{i} is next"} for i in range(25)]
        file = tmp_path / f"{point}.jsonl"
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        settings = {"device": "cuda", "dtype": dtype, **CONTROLS, **controls}
        return write_recipe(tmp_path, get_model_in(dtype), point, {"train": str(file), **(data or {})}, **settings)

    return write


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


def read_record(recipe: Path) -> dict[str, Any]:
    return dict(json.loads((recipe.parent / "adapter/lorasweep.json").read_text()))


def read(recipe: Path) -> tuple[bytes, list[Row]]:
    """The weights, and the log less its times."""
    adapter = recipe.parent / "adapter"
    rows = read_log(adapter / "training_log.csv")
    return (adapter / "adapter_model.safetensors").read_bytes(), [replace(row, seconds=0) for row in rows]


def test_it_learns_in_bf16_and_says_how_much_memory_it_took(make: Make, tmp_path: Path) -> None:
    held_out = write_samples(tmp_path / "validation.jsonl", "aceg")
    recipe = make("point", data={"validation": str(held_out)}, lora_dropout=0.1)
    assert train_and_end(recipe, 100) == 0, said(recipe)
    rows = read(recipe)[1]
    assert len(rows) == STEPS
    assert rows[-1].loss < 0.9 * rows[0].loss
    record = read_record(recipe)
    assert record["final_validation_loss"] == rows[-1].validation_loss is not None
    model = sum(file.stat().st_size for file in tmp_path.parent.glob("model-bf16/*.safetensors"))
    assert model < record["peak_memory_bytes"] < 100 * model
    tensors = load_file(recipe.parent / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "packing", [{}, {"packed": True, "max_seq_len": 1024, "batch_size": 1}], ids=["padded", "packed"]
)
def test_it_sees_what_a_training_on_the_cpu_of_the_same_machine_sees(make: Make, packing: dict[str, Any]) -> None:
    # Packed samples go through another attention on a GPU.
    plain = {"dtype": "fp32", "lora_dropout": 0.0, **packing}
    on_gpu, on_cpu = (make(device, device=device, **plain) for device in ("cuda", "cpu"))
    assert train_and_end(on_gpu, 100) == 0, said(on_gpu)
    command = [sys.executable, "-m", "lorasweep", "job", "train", "--recipe", on_cpu]
    command += ["--adapter", on_cpu.parent / "adapter"]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    logs = [read(recipe)[1] for recipe in (on_gpu, on_cpu)]
    # From the second step on they differ: the initial weights of A are drawn on the device.
    assert logs[0][0].loss == pytest.approx(logs[1][0].loss, rel=1e-4)
    assert [row.tokens for row in logs[0]] == [row.tokens for row in logs[1]]
    assert all(rows[-1].loss < 0.7 * rows[0].loss for rows in logs)
    assert read_record(on_cpu)["peak_memory_bytes"] is None


@pytest.mark.parametrize(
    ("dtype", "mode"), [("bf16", {}), ("fp32", DETERMINISTIC)], ids=["bf16", "fp32, deterministic"]
)
def test_one_that_was_told_to_stop_ends_as_if_it_had_not_been(make: Make, dtype: str, mode: dict[str, Any]) -> None:
    whole, stopped = (make(point, dtype, lora_dropout=0.1, **mode) for point in ("whole", "stopped"))
    assert train_and_end(whole, 100) == 0, said(whole)
    for step in (2, 7):
        assert train_and_end(stopped, 100, "told to stop", step) == 1
        assert f"told to stop (SIGTERM); step {step + 1} is saved" in said(stopped)
    assert train_and_end(stopped, 100) == 0, said(stopped)
    assert "Resuming after step 8," in said(stopped)
    assert read(stopped) == read(whole)


def test_when_memory_runs_out_the_next_attempt_takes_half_the_batch_until_it_fits(make: Make) -> None:
    # Long samples: the allocator gives memory out in pieces of some 20 MB.
    plain = {"epochs": 1, "gradient_accumulation_steps": 1, "max_steps_per_epoch": 2, "words": 300}
    peaks = {}
    for size in (1, 8):
        recipe = make(f"batch-{size}", batch_size=size, **plain)
        assert train_and_end(recipe, 100) == 0, said(recipe)
        peaks[size] = read_record(recipe)["peak_memory_bytes"]
    assert peaks[1] < peaks[8]
    recipe = make("limited", batch_size=8, **plain)
    limit = (peaks[1] + peaks[8]) // 2
    attempts = 1
    while train_and_end(recipe, 100, "has so many bytes of its GPU", limit):
        assert said(recipe).count("train: CUDA out of memory") == attempts, said(recipe)
        attempts += 1
        assert attempts < 4, said(recipe)
    record = read_record(recipe)
    assert record["batch_size_used"] == 8 // 2 ** (attempts - 1) < 8
    assert record["peak_memory_bytes"] <= limit
    assert record["steps"] == 2
