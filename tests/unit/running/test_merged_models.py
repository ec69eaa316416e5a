"""A merged model that no job will read is removed, and no other."""

import logging
from pathlib import Path

import pytest

from lorasweep.running.merged_models import MergedModels
from lorasweep.util.errors import InputError


def fail(models: MergedModels, rule: str, point: str, job: int = 1) -> None:
    """Pass on Snakemake's messages about a job that starts and fails."""
    started = {"event": "job_info", "rule_name": rule, "jobid": job, "wildcards": {"point": point}}
    models.emit(logging.makeLogRecord(started))
    models.emit(logging.makeLogRecord({"event": "job_error", "jobid": job}))


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


def test_a_model_goes_when_its_evaluation_ends_without_its_outputs(folder: Path) -> None:
    models = MergedModels(folder)
    make_models(folder, "a", "b")
    started = {"event": "job_info", "rule_name": "evaluate", "jobid": 7, "wildcards": {"point": "a"}}
    models.emit(logging.makeLogRecord(started))
    text = (
        "in rule evaluate:\nJob 7  completed successfully, but some output files are missing. Missing files after 60 s"
    )
    models.emit(logging.makeLogRecord({"msg": text, "event": "error"}))
    assert [path.name for path in folder.iterdir()] == ["b"]


def test_models_that_a_killed_run_left_move_with_the_folder_and_unfinished_ones_go(
    folder: Path, tmp_path: Path
) -> None:
    places = [tmp_path / "scratch", tmp_path / "other", None]
    make_models(folder, "a", ".b.partial")
    before = (folder / "a").stat().st_mtime
    for place in places:
        if place:
            place.mkdir()
        MergedModels(folder).prepare(str(place) if place else None)
        assert [path.name for path in folder.iterdir()] == ["a"]
        assert (folder / "a").stat().st_mtime == before
        assert folder.parent.is_symlink() == bool(place)
        for another in places:
            assert another is None or not another.exists() or bool(list(another.iterdir())) == (another == place)


def test_models_of_a_copied_results_folder_are_left_to_the_original(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    MergedModels(folder).prepare(str(tmp_path / "scratch"))
    make_models(folder, "a")
    copy = tmp_path / "copy/.scratch"
    copy.parent.mkdir()
    copy.symlink_to(folder.parent.readlink())
    models = MergedModels(copy / "merged")
    with pytest.raises(InputError, match=r"the merged models of the folder that '.*/copy' was copied or moved from"):
        models.prepare(None)
    models.remove_all()
    assert (folder / "a/model.safetensors").is_file()
    assert not copy.is_symlink()


@pytest.mark.parametrize(
    ("place", "said"),
    [("file", "is not a directory"), ("nowhere", "is not a directory"), ("full", "cannot be written to")],
)
def test_a_directory_that_cannot_be_used_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, said: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()

    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match=rf"^evaluation\.merged_models_in: '.*/{place}' {said}"):
        MergedModels(folder).prepare(str(tmp_path / place))
