"""A real SLURM: one that the tests start, or a site's own, when LORASWEEP_SLURM_PARTITION names a partition of it."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster, Unavailable
from slurm_sweep import SITE_PARTITION, SlurmSweep
from sweep import make_sweep, run_stage


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster | None]:
    """Our own cluster; `None` stands for the site's."""
    if SITE_PARTITION:
        yield None
        return
    # Always the same, so that a cluster which a killed run of the tests left behind is taken over and ended.
    folder = Path(tempfile.gettempdir(), "lorasweep-slurm-tests")
    own = Cluster(folder)
    try:
        own.start()
    except Unavailable as error:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no SLURM here: {error}")
    yield own
    own.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster | None) -> Cluster:
    if cluster is None:
        pytest.skip("a site's nodes are not killed for a test")
    return cluster


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    run_stage("train", "tiny_model.py", "--family", "llama3", "--output", directory)
    return directory


@pytest.fixture
def make(cluster: Cluster | None, tmp_path: Path, model: Path) -> Iterator[Callable[..., SlurmSweep]]:
    sweeps: list[SlurmSweep] = []

    def make(name: str, **sections: Any) -> SlurmSweep:
        made = make_sweep(tmp_path, model, name, **sections)
        sweep = SlurmSweep(made.directory, made.config)
        sweep.edit(controls={"epochs": 2})  # what is learnt is of no interest here
        sweeps.append(sweep)
        return sweep

    yield make
    for sweep in sweeps:
        if jobs := [*sweep.list_jobs("PENDING,RUNNING")]:
            subprocess.run(["scancel", *jobs], check=False, capture_output=True)
