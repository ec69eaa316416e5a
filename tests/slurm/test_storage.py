"""The bound on merged models holds on SLURM at every moment, also when evaluations fail and are cancelled."""

import subprocess
from collections.abc import Callable

import pytest

from sampling import sample_merged_models
from slurm_sweep import SlurmSweep
from sweep import SUMMED_UP

BOUND = 2


@pytest.mark.long  # tests/e2e/test_storage.py says so of one machine
@pytest.mark.parametrize("points", [4, 12])
def test_the_bound_holds_while_evaluations_fail_and_adapters_stay(make: Callable[..., SlurmSweep], points: int) -> None:
    sweep = make("bounded", variables={"seed": list(range(points))})
    sweep.edit(
        evaluation={
            "baseline": False,
            "max_merged_models": BOUND,
            "tasks": [{"task": "tasks.py@letters", "limit": 1}],
        },
    )
    # One evaluation fails; another does not end, and is cancelled from outside.
    held = sweep.directory / "held"
    held.touch()
    disturbances = {"FAIL_EVALUATION_OF": "seed=1", "HELD_EVALUATION_OF": f"seed=3:{held}"}
    sweep.environment |= disturbances
    with sample_merged_models(sweep.results / ".scratch/merged") as samples:
        run = sweep.start("--retries", "0")
        [slow] = sweep.wait_for(
            "the evaluation to run",
            lambda: [job for job, text in sweep.list_jobs().items() if text.endswith("evaluate_wildcards_seed=3")],
        )
        subprocess.run(["scancel", slow], check=True)
        assert sweep.wait(run) == 1
    assert f"bounded: {points - 2} of {points} points done, 2 failed" in sweep.said
    assert samples.peak == BOUND
    assert not (sweep.results / ".scratch").exists()
    assert (sweep.results / "seed=1/adapter/adapter_model.safetensors").is_file()
    assert sweep.plan() == {"merge": 2, "evaluate": 2, "cleanup": 2, **SUMMED_UP}
    for name in disturbances:
        del sweep.environment[name]
    sweep.run("--retries", "0", "--until", "cleanup")
    assert sweep.plan() == SUMMED_UP
