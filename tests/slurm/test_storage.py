"""The bound on merged models holds on SLURM at every moment, also when evaluations fail and are killed."""

import subprocess
import threading
import time
from collections.abc import Callable

from sampling import sample_merged_models
from slurm_sweep import SlurmSweep

POINTS = 12
BOUND = 2


def test_the_bound_holds_on_slurm(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("bounded", variables={"seed": list(range(POINTS))})
    sweep.edit(
        evaluation={
            "baseline": False,
            "max_merged_models": BOUND,
            "tasks": [{"task": "tasks.py@letters", "limit": 1}],
        },
    )
    # One evaluation fails; another takes too long, and is cancelled from outside.
    sweep.environment |= {"FAIL_EVALUATION_OF": "seed=3", "SLOW_EVALUATION_OF": "seed=5:600"}
    stop = threading.Event()

    def cancel_the_slow() -> None:
        while not stop.is_set():
            slow = [
                job
                for job, comment in sweep.list_jobs().items()
                if comment.endswith("evaluate_merged_wildcards_seed=5")
            ]
            if slow and list(sweep.results.glob("seed=5/merged/lorasweep-*/model/lorasweep.json")):
                subprocess.run(["scancel", *slow], check=True)
                return
            time.sleep(1)

    canceller = threading.Thread(target=cancel_the_slow)
    canceller.start()
    with sample_merged_models(sweep.results) as samples:
        done = sweep.snakemake("--retries", "0")
    stop.set()
    canceller.join()
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert f"bounded: {POINTS - 2} of {POINTS} points done, 2 failed" in said
    assert samples.peak == BOUND
    assert not list(sweep.results.glob("*/merged"))
