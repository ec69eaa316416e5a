"""The bound on merged models holds at every moment, whatever the number of points, also when evaluations fail."""

import threading
import time
from pathlib import Path

import pytest

from sampling import sample_merged_models
from sweep import SUMMED_UP, Sweep
from sweep import TRAINED_POINTS as POINTS


def evaluate_and_sample(
    sweep: Sweep, points: int, waits_for: int, *options: str, **evaluation: object
) -> tuple[int, int]:
    """Evaluate so many points, one of which fails; return Snakemake's exit status and the most merged models at once.

    The evaluations wait for each other until there are so many models, however slow the machine is.
    """
    hold = sweep.directory / "let-go"
    sweep.environment |= {"FAIL_EVALUATION_OF": "seed=1", "HOLD_EVALUATIONS_UNTIL": str(hold)}
    sweep.edit(variables={"seed": list(range(points))}, evaluation=evaluation)
    has_ended = threading.Event()

    with sample_merged_models(sweep.results / ".scratch/merged") as samples:

        def let_go() -> None:
            began = time.monotonic()
            while not has_ended.wait(0.1):
                if max(samples.counts, default=0) >= waits_for or time.monotonic() > began + 1800:
                    hold.touch()

        thread = threading.Thread(target=let_go)
        thread.start()
        try:
            done = sweep.snakemake("--cores", "4", *options)
        finally:
            has_ended.set()
            thread.join()
    assert len(list(sweep.results.glob("*/eval/metrics.json"))) == points - 1
    assert not (sweep.results / ".scratch").exists()
    return done.returncode, samples.peak


ALIKE = ("--set-threads", "merge=1", "evaluate=1")
MERGES_ASK_FOR_LESS = ("--set-threads", "merge=1", "evaluate=2", "--retries", "1")


@pytest.mark.parametrize(
    ("bound", "options", "points"),
    [
        (2, MERGES_ASK_FOR_LESS, POINTS),
        pytest.param(1, ALIKE, 2, marks=pytest.mark.long),
        pytest.param(2, ALIKE, POINTS, marks=pytest.mark.long),
        pytest.param(1, MERGES_ASK_FOR_LESS, POINTS, marks=pytest.mark.long),
    ],
)
def test_the_bound_holds_on_one_machine(
    trained: Sweep, tmp_path: Path, bound: int, options: tuple[str, ...], points: int
) -> None:
    sweep = trained.copy(tmp_path)
    status, peak = evaluate_and_sample(sweep, points, bound, *options, max_merged_models=bound)
    assert status == 1
    assert peak == bound


@pytest.mark.long  # tests/unit says so of the folder
def test_merged_models_can_be_elsewhere_and_leave_nothing_there(
    trained: Sweep, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    sweep = trained.copy(tmp_path)
    status, peak = evaluate_and_sample(sweep, 2, 2, *ALIKE, max_merged_models=2, merged_models_in=str(scratch))
    assert (status, peak) == (1, 2)
    assert not list(scratch.iterdir())
    assert not (sweep.results / ".scratch").is_symlink()
    sweep.edit(evaluation={"merged_models_in": None})
    assert sweep.plan() == {"merge": 1, "evaluate": 1, "cleanup": 1, **SUMMED_UP}


@pytest.mark.long
def test_by_default_each_evaluation_has_its_model_and_one_more_is_merged(trained: Sweep, tmp_path: Path) -> None:
    options = ("--set-threads", "merge=1", "evaluate=2")
    status, peak = evaluate_and_sample(trained.copy(tmp_path), POINTS, 3, *options)
    assert status == 1
    assert peak == 3


def test_another_scheduler_is_refused(trained: Sweep, tmp_path: Path) -> None:
    refused = trained.copy(tmp_path).snakemake("--scheduler", "greedy")
    assert refused.returncode == 1
    assert "--scheduler: 'greedy' does not limit the number of merged models" in refused.stdout + refused.stderr
