"""The bound on merged models holds at every moment, whatever the number of points, also when evaluations fail."""

import threading
import time
from pathlib import Path

import pytest

from sampling import sample_merged_models
from sweep import TRAINED_POINTS as POINTS
from sweep import Sweep


def evaluate_and_sample(
    sweep: Sweep, scratch: Path, points: int, waits_for: int, **evaluation: object
) -> tuple[int, int]:
    """Evaluate so many points, one of which fails; return Snakemake's exit status and the most merged models at once.

    The evaluations wait for each other until there are so many models, however slow the machine is.
    """
    hold = scratch.with_name(f"{scratch.name}-let-go")
    sweep.environment |= {
        "FAIL_EVALUATION_OF": "seed=1",
        "TMPDIR": str(scratch),
        "HOLD_EVALUATIONS_UNTIL": str(hold),
    }
    sweep.edit(variables={"seed": list(range(points))}, evaluation=evaluation)
    has_ended = threading.Event()

    with sample_merged_models(sweep.results, scratch) as samples:

        def let_go() -> None:
            began = time.monotonic()
            while not has_ended.wait(0.1):
                if max(samples.counts, default=0) >= waits_for or time.monotonic() > began + 1800:
                    hold.touch()

        thread = threading.Thread(target=let_go)
        thread.start()
        try:
            done = sweep.snakemake("--cores", "4", "--set-threads", "evaluate_merged=1")
        finally:
            has_ended.set()
            thread.join()
    assert len(list(sweep.results.glob("*/eval/metrics.json"))) == points - 1
    assert not list(sweep.results.glob("*/merged"))
    assert not list(scratch.glob("lorasweep-*"))
    return done.returncode, samples.peak


@pytest.mark.parametrize(
    ("bound", "place", "points"),
    [(2, "results", POINTS), (1, "tmpdir", 2), pytest.param(1, "results", POINTS, marks=pytest.mark.long)],
)
def test_the_bound_holds_on_one_machine(
    trained: Sweep, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, bound: int, place: str, points: int
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    settings = {"max_merged_models": bound, "merged_models_in": place}
    status, peak = evaluate_and_sample(trained.copy(tmp_path), scratch, points, bound, **settings)
    assert status == 1
    assert peak == bound


@pytest.mark.long
def test_without_a_bound_what_fits_runs_at_once(
    trained: Sweep, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    status, peak = evaluate_and_sample(trained.copy(tmp_path), tmp_path_factory.mktemp("scratch"), 3, 3)
    assert status == 1
    assert peak == 3
