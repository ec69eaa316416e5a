"""Who holds a sweep: known by name while alive, seen to be gone when dead, never guessed of another machine."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lorasweep.running.controller import Holder, give_up, hold, read_holder, release, remove_locks


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "results" / ".controller.json"


def test_a_holder_that_lives_is_named_and_not_gone(file: Path) -> None:
    hold(file, ["run-1"])
    holder = read_holder(file)
    assert holder is not None
    assert holder.is_here
    assert not holder.is_gone
    assert holder.slurm_runs == ["run-1"]
    assert f"on {holder.host} (process {holder.pid}, since " in str(holder)


def test_a_process_that_ended_is_gone(file: Path) -> None:
    hold(file, [])
    holder = read_holder(file)
    assert holder is not None
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    assert holder.model_copy(update={"pid": int(ended.stdout)}).is_gone


def test_another_process_of_the_same_id_is_not_the_holder(file: Path) -> None:
    hold(file, [])
    holder = read_holder(file)
    assert holder is not None
    assert holder.model_copy(update={"started": holder.started - 3600}).is_gone


def test_of_another_machine_nothing_is_known() -> None:
    holder = Holder(host="another", user="a", pid=1, started=0.0)
    assert not holder.is_here
    assert not holder.is_gone


def test_whom_a_person_gave_up_is_gone_wherever_he_ran(file: Path) -> None:
    file.parent.mkdir()
    file.write_text(Holder(host="another", user="a", pid=1, started=0.0, slurm_runs=["run-1"]).model_dump_json())
    give_up(file)
    holder = read_holder(file)
    assert holder is not None
    assert holder.is_gone
    assert holder.slurm_runs == ["run-1"]


def test_only_the_holder_releases(file: Path) -> None:
    hold(file, [])
    other = Holder(host="another", user="a", pid=psutil.Process().pid, started=0.0)
    file.write_text(other.model_dump_json())
    release(file)
    assert file.exists()
    hold(file, [])
    release(file)
    assert not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_file_that_is_cut_short_names_nobody(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    assert read_holder(tmp_path / "file") is None


def test_only_locks_on_the_experiments_files_are_removed(tmp_path: Path) -> None:
    locks = tmp_path / "locks"
    locks.mkdir()
    for number, name in enumerate(("mine", "mine_too")):
        (locks / f"{number}.output.lock").write_text(f"results/{name}/results.csv\n")
        (locks / f"{number}.input.lock").write_text("train.jsonl\n")
    assert remove_locks(locks, "results/mine")
    assert sorted(lock.name for lock in locks.iterdir()) == ["1.input.lock", "1.output.lock"]
    assert not remove_locks(locks, "results/mine")
    assert remove_locks(locks, "results/mine_too")
    assert not locks.exists()
