"""torchtune and trl are one training: from the same adapter, on the same data in the same order, in fp32 on a CPU."""

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls, Data, Model
from lorasweep.trainers import TrainingSpec, get_trainer
from lorasweep.trainers.training_log import Row, read_log
from sweep import RUN, run_stage

STEPS = 20

PAIRS = list(pairwise(ascii_lowercase))

# All that changes a step: warm-up and decay, weight decay, clipping (which clips here), and samples of several lengths.
CONTROLS: dict[str, Any] = {
    "epochs": 4,
    "lr": 1e-3,
    "num_warmup_steps": 3,
    "weight_decay": 0.1,
    "clip_grad_norm": 1.0,
    "lora_rank": 4,
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
    "apply_lora_to_mlp": True,
    "lora_dropout": 0.0,
    "seed": 7,
}


def write_recipe(trainer: str, model: Path, folder: Path, **changes: Any) -> Path:
    """Write the recipe of a training in a folder, and its data beside it."""
    folder.mkdir(parents=True)
    data = folder / "train.jsonl"
    samples = [{"input": "after " + a * (1 + i % 4), "output": b * (1 + i % 3)} for i, (a, b) in enumerate(PAIRS)]
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    spec = TrainingSpec(
        checkpoint=read_checkpoint(model),
        controls=Controls(**{**CONTROLS, **changes}),
        swept=(),
        model=Model(path=str(model), device="cpu", dtype="fp32"),
        data=Data(train=str(data)),
        output_dir=str(folder / "sweep/trainings/point"),
    )
    recipe = Path(spec.output_dir, "recipe.yaml")
    recipe.parent.mkdir(parents=True)
    recipe.write_text(get_trainer(trainer).recipe(spec))
    return recipe


def train(trainer: str, recipe: Path) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Run the job; return the rows of its log, and the adapter."""
    adapter = recipe.parent / "adapter"
    command = [RUN, get_trainer(trainer).STAGE, "-m", "lorasweep", "job", "train", "--trainer", trainer]
    command += ["--recipe", recipe, "--adapter", adapter]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_log(adapter / "training_log.csv"), load_file(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("batch_size", "gradient_accumulation_steps"), [(5, 1), pytest.param(1, 5, marks=pytest.mark.long)]
)
def test_losses_of_every_step_and_adapters_are_the_same(
    model: Path, tmp_path: Path, batch_size: int, gradient_accumulation_steps: int
) -> None:
    batches = {"batch_size": batch_size, "gradient_accumulation_steps": gradient_accumulation_steps}
    recipe = write_recipe("torchtune", model, tmp_path / "torchtune", **batches)
    initial = tmp_path / "initial"
    run_stage("train", "e2e/initial_adapter.py", "--recipe", recipe, "--state", tmp_path / "state", "--output", initial)
    begun = load_file(initial / "adapter_model.safetensors")
    assert all(value.any() == ("lora_A" in name) for name, value in begun.items())
    rows, adapter = train("torchtune", recipe)

    override = {"initial_adapter": str(initial)}
    other = write_recipe("trl", model, tmp_path / "trl", **batches, _override=override)
    others, other_adapter = train("trl", other)

    assert len(rows) == len(others) == STEPS
    assert [(row.step, row.epoch, row.tokens) for row in others] == [(row.step, row.epoch, row.tokens) for row in rows]
    assert [row.lr for row in others] == pytest.approx([row.lr for row in rows], rel=1e-6)
    for row, same in zip(rows, others, strict=True):
        print(f"{row.step:2} {row.loss:.7f} {same.loss:.7f}")
    assert [row.loss for row in others] == pytest.approx([row.loss for row in rows], rel=1e-5, abs=1e-5)
    assert rows[-1].loss < rows[0].loss
    assert other_adapter.keys() == adapter.keys() == begun.keys()
    distance = max(float(np.abs(other_adapter[name] - adapter[name]).max()) for name in adapter)
    print(f"adapters: {distance:.1e}")
    assert distance < 1e-4
    # That is little beside what was learnt.
    assert max(float(np.abs(adapter[name] - begun[name]).max()) for name in adapter) > 1e-3
