"""In short what benchmarks/soak.py does: a sweep that a monkey disturbs gives what an undisturbed one gives."""

from pathlib import Path

import pytest

from cluster import Cluster
from monkey import (
    ONE_THREAD,
    RESOURCES,
    SAVED_OFTEN,
    SETTINGS,
    Monkey,
    find_differences,
    find_leftovers,
    wait_until_idle,
)
from slurm_sweep import SlurmSweep
from sweep import MODES, make_sweep


@pytest.mark.long
@pytest.mark.usefixtures("apart")
def test_a_sweep_with_a_monkey_gives_what_one_without_gives(own_cluster: Cluster, model: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    made = [make_sweep(tmp_path / name, model, "soak", **MODES) for name in ("undisturbed", "disturbed")]
    for each in made:
        each.edit(**SETTINGS)
        each.edit(evaluation={"baseline": False})
    undisturbed = made[0]
    undisturbed.run("--cores", "2", *ONE_THREAD)
    sweep = SlurmSweep(made[1].directory, made[1].config, {"TMPDIR": str(tmp_path / "tmp")})
    monkey = Monkey(sweep, own_cluster, 4, "--retries", "1", *SAVED_OFTEN, *RESOURCES)
    try:
        monkey.torment(120)
        monkey.finish()
    finally:
        monkey.stop()
    wait_until_idle(sweep)
    assert monkey.kills.total() > 2
    assert find_differences(sweep.results, undisturbed.results) == []
    assert find_leftovers(sweep.directory, sweep.results, tmp_path / "tmp") == []
