"""A real SLURM: one that the tests start, or a site's own, when LORASWEEP_SLURM_PARTITION names a partition of it.

The tests mostly wait, so several share it at a time (`pytest -n`): the process that hands out the tests starts it.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import TESTS_VARIABLE, Cluster, Unavailable, forget_settings, run_for_tests
from slurm_sweep import SITE_PARTITION, SlurmSweep
from sweep import make_sweep, run_stage

NO_SLURM = "LORASWEEP_NO_SLURM"
"""Says to those who run tests why there is none."""

SWEEP_ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
"""So that trainers of the tests are found."""

if not SITE_PARTITION:
    forget_settings()

_at_end = contextlib.ExitStack()


@pytest.hookimpl(tryfirst=True)  # before others who run tests are started, who are told by the environment
def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if hasattr(config, "workerinput") or config.option.collectonly or SITE_PARTITION:
        return

    def say(text: str) -> None:
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(text)
        reporter.flush()

    os.environ.pop(NO_SLURM, None)
    try:
        own = _at_end.enter_context(run_for_tests(say))
    except Unavailable as error:
        os.environ[NO_SLURM] = str(error)
    else:
        os.environ[TESTS_VARIABLE] = str(own.dir)


def pytest_unconfigure() -> None:
    _at_end.close()


@pytest.fixture(scope="session")
def cluster() -> Cluster | None:
    """Our own cluster; `None` stands for the site's."""
    if SITE_PARTITION:
        return None
    if TESTS_VARIABLE not in os.environ:
        pytest.skip(f"no SLURM here: {os.environ.get(NO_SLURM, 'name tests/slurm to pytest')}")
    return Cluster(Path(os.environ[TESTS_VARIABLE]))


@pytest.fixture(scope="session")
def own_cluster(cluster: Cluster | None) -> Cluster:
    if cluster is None:
        pytest.skip("a site's nodes are not killed for a test")
    return cluster


@pytest.fixture(scope="session")
def make_once(cluster: Cluster | None, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder by a function, once for all who run tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill: Callable[[Path], Any]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def model(make_once: Callable[..., Path]) -> Path:
    return make_once(
        "tiny", lambda folder: run_stage("train", "tiny_model.py", "--family", "llama3", "--output", folder)
    )


@pytest.fixture(autouse=True)
def disturbance(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that are marked as `alone` have the cluster for themselves, since they disturb it as a whole."""
    if TESTS_VARIABLE not in os.environ:
        yield
        return
    with (Path(os.environ[TESTS_VARIABLE]) / "disturbance.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH)
        yield


@pytest.fixture
def apart(own_cluster: Cluster) -> Iterator[None]:
    """The nodes that may be killed or filled, for one test at a time."""
    with (own_cluster.dir / "apart.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def make(cluster: Cluster | None, tmp_path: Path, model: Path) -> Iterator[Callable[..., SlurmSweep]]:
    """Make a sweep; its trainings learn nothing, unless it names another trainer.

    One that is made beside another has its settings and its directory.
    """
    sweeps: list[SlurmSweep] = []

    def make(name: str, beside: SlurmSweep | None = None, **sections: Any) -> SlurmSweep:
        if beside:
            config = {**beside.config, "experiment": {"name": name}}
            sweep = SlurmSweep(beside.directory, config, dict(SWEEP_ENVIRONMENT), file=f"{name}.yaml")
        else:
            made = make_sweep(tmp_path, model, name, **{"trainer": "quick_trainer", **sections})
            sweep = SlurmSweep(made.directory, made.config, dict(SWEEP_ENVIRONMENT))
        sweep.environment["HOLD_TRAINING"] = str(sweep.hold)
        sweep.edit(controls={"epochs": 2})  # what is learnt is of no interest here
        sweeps.append(sweep)
        return sweep

    yield make
    for sweep in sweeps:
        sweep.end()
