"""A merged model that no job will read is removed, and no other."""

import logging
from pathlib import Path

import pytest

from lorasweep.running.merged_models import MergedModels
from lorasweep.util.errors import InputError


def fail(models: MergedModels, rule: str, point: str, job: int = 1) -> None:
    """Pass on Snakemake's message about a failed job."""
    record = logging.LogRecord("snakemake", logging.ERROR, "", 0, None, None, None)
    record.__dict__ |= {"event": "job_error", "rule_name": rule, "jobid": job}
    record.__dict__["log"] = [f"results/e/logs/{rule}/{point}.log", f".snakemake/slurm_logs/rule_{rule}/{point}/7.log"]
    models.emit(record)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results/e/.scratch/merged"


def make_models(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()


def test_a_model_stays_for_the_retry_and_goes_with_the_last_failure(folder: Path) -> None:
    models = MergedModels(folder)
    models.expect_retries(1)
    make_models(folder, "lr=1e-4", "lr=1e-3", "7")
    fail(models, "evaluate", "lr=1e-4")
    assert (folder / "lr=1e-4").is_dir()
    fail(models, "evaluate", "lr=1e-4")
    assert sorted(path.name for path in folder.iterdir()) == ["7", "lr=1e-3"]


def test_what_a_killed_merge_has_written_goes_before_its_retry(folder: Path) -> None:
    models = MergedModels(folder)
    models.expect_retries(1)
    make_models(folder, ".a.partial", ".b.partial")
    fail(models, "train", "b")
    fail(models, "merge", "a")
    assert [path.name for path in folder.iterdir()] == [".b.partial"]


def test_models_elsewhere_have_a_folder_of_their_own_which_goes_at_the_end(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    make_models(scratch / "of-others", "model")
    models = MergedModels(folder)
    models.prepare(str(scratch))
    make_models(folder, "a")
    assert len(list(scratch.glob("lorasweep-e-*/merged/a/model.safetensors"))) == 1
    models.remove_all()
    assert [path.name for path in scratch.iterdir()] == ["of-others"]
    assert not folder.parent.is_symlink()


def test_models_that_a_killed_run_left_are_used_where_they_are(folder: Path, tmp_path: Path) -> None:
    make_models(folder, "a")
    MergedModels(folder).prepare(str(tmp_path / "scratch"))
    assert (folder / "a/model.safetensors").is_file()
    assert not folder.parent.is_symlink()


def test_a_directory_that_cannot_be_written_to_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^evaluation\.merged_models_in: '.*/file/models' cannot be written to"):
        MergedModels(folder).prepare(str(tmp_path / "file/models"))
