"""A training that has too little memory takes half the batch and twice the accumulation at its next attempt.

The GPU's error is a mock: what is tested is what follows from it. The kernel's kill is real.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memory_cgroup import limit_memory

from interrupted_training import train_and_end
from lorasweep.trainers.memory_kills import Attempt, explain_memory_kill

Make = Callable[..., Path]


def said(recipe: Path) -> str:
    return (recipe.parent / "train.log").read_text()


def weights(recipe: Path) -> bytes:
    return (recipe.parent / "adapter/adapter_model.safetensors").read_bytes()


def run_out(recipe: Path, times: int) -> None:
    for _ in range(times):
        assert train_and_end(recipe, 100, "out of memory", 1) == 1


@pytest.mark.parametrize(
    ("save_every", "controls"),
    [
        (1, {"max_steps_per_epoch": 10}),
        pytest.param(1, {}, marks=pytest.mark.long),
        (100, {}),
    ],
    ids=["from a state, with a limit that no epoch reaches", "from a state", "from the beginning"],
)
def test_the_effective_batch_stays(make: Make, save_every: int, controls: dict[str, Any]) -> None:
    # 25 samples: a quarter of a batch of 4 is left over where batches are of 1, and must not count.
    plain = {"lora_dropout": 0.0, "epochs": 2}
    recipe = make("halved", batch_size=4, gradient_accumulation_steps=1, **plain, **controls)
    run_out(recipe, 2)
    assert "train: CUDA out of memory; batch_size 4 is too large: the next attempt halves it" in said(recipe)
    assert train_and_end(recipe, save_every, "killed in a step", 6) == -9
    assert train_and_end(recipe, save_every) == 0
    assert ("Resuming after step 6" in said(recipe)) == (save_every == 1)
    same = make("same", batch_size=1, gradient_accumulation_steps=4, max_steps_per_epoch=6, **plain)
    assert train_and_end(same, 100) == 0
    assert weights(recipe) == weights(same)
    records = [json.loads((file.parent / "adapter/lorasweep.json").read_text()) for file in (recipe, same)]
    assert [(record["batch_size_used"], record["steps"]) for record in records] == [(1, 12), (1, 12)]
    assert not (recipe.parent / "state/train.memory.json").exists()


def test_a_batch_is_halved_three_times_at_most(make: Make) -> None:
    recipe = make(batch_size=16, gradient_accumulation_steps=1)
    run_out(recipe, 4)
    assert "batch_size 2 is too large, after 3 halvings" in said(recipe)


def test_an_odd_batch_has_no_half(make: Make) -> None:
    recipe = make(batch_size=3, gradient_accumulation_steps=1)
    run_out(recipe, 1)
    assert "train: CUDA out of memory; batch_size 3 is too large, and is odd" in said(recipe)
    assert not (recipe.parent / "state/train.memory.json").exists()


def test_another_recipe_begins_with_its_own_batch(make: Make) -> None:
    recipe = make(batch_size=4, gradient_accumulation_steps=1)
    run_out(recipe, 1)
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    assert train_and_end(recipe) == 0
    assert json.loads((recipe.parent / "adapter/lorasweep.json").read_text())["batch_size_used"] == 4


def test_what_the_kernel_kills_for_its_memory_takes_half_the_batch_and_what_is_killed_otherwise_does_not(
    make: Make,
) -> None:
    recipe = make(batch_size=4, gradient_accumulation_steps=1)
    try:
        with limit_memory(100_000_000) as group:
            (recipe.parent / "cgroup").write_text(str(group))
            assert train_and_end(recipe, 1, "over its memory", 2) == -9
    except OSError as error:
        pytest.skip(f"no cgroup with a limit of memory can be made here: {error}")
    assert train_and_end(recipe, 1, "killed in a step", 3) == -9
    assert "An earlier attempt was killed for running out of memory: the kernel has since killed" in said(recipe)
    assert "An earlier attempt ran out of memory: batch_size is now 2" in said(recipe)
    assert train_and_end(recipe) == 0
    assert said(recipe).count("An earlier attempt was killed for running out of memory") == 1
    assert json.loads((recipe.parent / "adapter/lorasweep.json").read_text())["batch_size_used"] == 2


@pytest.mark.parametrize(
    ("changes", "is_blamed"),
    [
        ({"oom_kills": 4}, True),
        ({}, False),
        ({"oom_kills": 4, "boot": "another"}, False),
        ({"oom_kills": 4, "host": "another"}, False),
        ({"oom_kills": -1}, False),
    ],
)
def test_the_kernel_is_asked_of_its_own_machine_since_the_attempt_began(
    changes: dict[str, Any], is_blamed: bool
) -> None:
    before = Attempt("recipe", None, "host", "boot", 3)
    assert bool(explain_memory_kill(before, replace(before, **changes))) == is_blamed


def test_a_slurm_job_that_was_queued_again_was_not_killed_for_its_memory() -> None:
    before = Attempt("recipe", "7", "host", "boot", 3)
    assert not explain_memory_kill(before, replace(before, oom_kills=4))
