"""The bound on merged models holds at every moment, whatever the number of points, also when evaluations fail."""

from pathlib import Path

import pytest

from sampling import sample_merged_models
from sweep import TRAINED_POINTS as POINTS
from sweep import Sweep


@pytest.mark.parametrize(("bound", "place"), [(1, "results"), (2, "results"), (1, "tmpdir")])
def test_the_bound_holds_on_one_machine(
    trained: Sweep, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, bound: int, place: str
) -> None:
    sweep = trained.copy(tmp_path)
    scratch = tmp_path_factory.mktemp("scratch")
    sweep.environment |= {"FAIL_EVALUATION_OF": "seed=3", "TMPDIR": str(scratch)}
    points = 4 if bound == 1 else POINTS
    sweep.edit(
        variables={"seed": list(range(points))},
        evaluation={"max_merged_models": bound, "merged_models_in": place},
    )
    with sample_merged_models(sweep.results, scratch) as samples:
        done = sweep.snakemake("--cores", "4", "--set-threads", "evaluate_merged=1")
    assert done.returncode == 1
    assert samples.peak == bound
    assert len(list(sweep.results.glob("*/eval/metrics.json"))) == points - 1
    assert not list(sweep.results.glob("*/merged"))
    assert not list(scratch.glob("lorasweep-*"))


def test_without_a_bound_what_fits_runs_at_once(trained: Sweep, tmp_path: Path) -> None:
    sweep = trained.copy(tmp_path)
    sweep.edit(variables={"seed": list(range(4))})
    with sample_merged_models(sweep.results) as samples:
        sweep.run("--cores", "4", "--set-threads", "evaluate_merged=1")
    assert samples.peak > 2
