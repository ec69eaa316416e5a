"""The run around the jobs: who holds the sweep, how much runs at a time, and what is left at the end."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorasweep.experiment.sections import Data, Evaluation, ModelSection, Slurm
from lorasweep.layout import HOLDER
from lorasweep.running.controller import hold, read_holder
from lorasweep.running.run import MOST_PARALLEL, Options, Places, Run, count_parallel_jobs
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import InputError

CLUSTER = Places(cores=None, nodes=50, gpus=None)


def make_sweep(device: str = "cuda", parallel_jobs: int | None = None, most_gpus: int = 1) -> Sweep:
    """A stand-in with what is asked of a sweep here."""
    plan = SimpleNamespace(parallel_jobs=parallel_jobs)
    experiment = SimpleNamespace(plan=plan, model=ModelSection(), data=Data(), evaluation=Evaluation(), slurm=Slurm())
    stands_in = SimpleNamespace(
        experiment=experiment,
        is_on_gpus=device == "cuda",
        most_gpus=most_gpus,
        results=Path("results/mine"),
        missing_model=None,
        folders=["a", "b"],
        baselines={},
        points={},
        named_points={},
        trainings={},
        job_names={},
        job_owners={},
    )
    return cast(Sweep, stands_in)


@pytest.mark.parametrize(
    ("sweep", "places", "jobs"),
    [
        (make_sweep(), CLUSTER, 50),
        (make_sweep(parallel_jobs=3), CLUSTER, 3),
        (make_sweep(), Places(None, 2**63, None), MOST_PARALLEL),
        (make_sweep("cpu"), Places(16, None, None), 4),
        (make_sweep("cpu"), Places(2, None, None), 1),
        (make_sweep(), Places(64, None, 4), 4),
        (make_sweep(most_gpus=2), Places(64, None, 4), 2),
        (make_sweep("cpu", most_gpus=2), Places(16, None, None), 2),
        (make_sweep("cpu"), Places(64, None, 1), 16),
    ],
)
def test_as_many_jobs_run_at_a_time_as_have_a_place(sweep: Sweep, places: Places, jobs: int) -> None:
    assert count_parallel_jobs(sweep, places) == jobs


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"scheduler": "greedy"}, "--scheduler: 'greedy' does not limit the number of merged models"),
        ({"subsample": 10}, "--scheduler-subsample: 10 does not limit the number of merged models"),
        ({"keeps_temporary": True}, "--notemp does not limit the number of merged models"),
    ],
)
def test_an_option_that_takes_the_limit_off_merged_models_is_refused(changed: dict[str, Any], said: str) -> None:
    good = Options(scheduler="lorasweep", subsample=None, keeps_temporary=False, retries=1, is_touch=False)
    good.check()
    with pytest.raises(InputError, match=said):
        replace(good, **changed).check()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return Run(make_sweep(), tmp_path, tmp_path / "sources/7", uses_conda=False, ignores_shortage=False)


def listen(run: Run, is_dry_run: bool = True) -> tuple[logging.Logger, list[str]]:
    logger = logging.Logger("snakemake")
    shown: list[str] = []
    run.show_plan = lambda wanted, places: shown.append("shown")  # type: ignore[method-assign]
    run.listen(logger, lambda: is_dry_run, lambda: (set(), CLUSTER))
    return logger, shown


def close(logger: logging.Logger) -> None:
    for handler in logger.handlers:
        handler.close()


def tell(logger: logging.Logger, message: str, **said: Any) -> None:
    logger.handle(logging.makeLogRecord({"msg": message, "levelno": logging.INFO, **said}))


@pytest.mark.parametrize("is_dry_run", [True, False])
def test_a_dry_run_ends_with_the_plan(run: Run, is_dry_run: bool) -> None:
    logger, shown = listen(run, is_dry_run)
    tell(logger, "Job stats", event="run_info")
    close(logger)
    assert shown == ["shown"] * is_dry_run


def test_a_call_that_ends_before_there_is_a_plan_shows_none(run: Run) -> None:
    logger, shown = listen(run)
    tell(logger, "Using profile")
    close(logger)
    assert shown == []


def test_the_copies_of_the_rules_go_with_the_call_and_its_name_with_the_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sources/7").mkdir(parents=True)
    logger, _ = listen(run)
    hold(Path("results/mine") / HOLDER, [])
    close(logger)
    assert not (tmp_path / "sources/7").exists()
    assert read_holder(Path("results/mine") / HOLDER) is None


def test_unlock_gives_up_whoever_held_the_sweep(run: Run) -> None:
    holder = Path("results/mine") / HOLDER
    hold(holder, ["run-1"])
    logger, _ = listen(run)
    tell(logger, "Unlocked working directory.")
    given_up = read_holder(holder)
    assert given_up is not None
    assert given_up.is_gone
    assert given_up.slurm_runs == ["run-1"]
