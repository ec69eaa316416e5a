"""What an evaluation leaves behind is used for that evaluation, and for no other."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evaluation_specs import make_spec
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState, is_evaluated
from lorasweep.results.manifest import clean_up
from lorasweep.util.errors import InputError

VERSIONS = {"torch": "1"}


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    record = {"adapter_sha256": hashlib.sha256(b"weights").hexdigest()}
    (tmp_path / "adapter/lorasweep.json").write_text(json.dumps(record))
    return tmp_path


def finish(point: Path, spec: EvaluationSpec) -> EvaluationState:
    state = EvaluationState(spec, point)
    state.begin(VERSIONS)
    logs = state.get_log_dir("a")
    logs.mkdir(parents=True)
    (logs / "1.eval").write_text("log")
    state.finish({"a": logs / "1.eval"}, {"tasks": {}})
    return state


CHANGES = [{"max_tokens": 3}, {"files": {"a.py": "1"}}, {"seed": 1}, {"backend": "vllm"}]


@pytest.mark.parametrize("change", CHANGES, ids=[next(iter(change)) for change in CHANGES])
def test_what_was_begun_or_done_is_dropped_for_another_evaluation(point: Path, change: dict[str, Any]) -> None:
    finish(point, make_spec())
    other = EvaluationState(make_spec(**change), point)
    assert not other.is_finished()
    other.begin(VERSIONS)
    assert not other.get_log_dir("a").exists()
    with pytest.raises(InputError, match="was not evaluated"):
        other.publish()


@pytest.mark.parametrize("change", CHANGES[:2], ids=["max_tokens", "files"])
def test_a_result_of_another_evaluation_than_the_run_had_planned_is_not_taken(
    point: Path, change: dict[str, Any]
) -> None:
    """A job that reads its files later than the run may find others."""
    planned = make_spec(**change)
    finish(point, make_spec()).publish()
    point.joinpath("state/eval/done").mkdir(parents=True)
    shutil.copy(point / "eval/metrics.json", point / "state/eval/done/metrics.json")
    with pytest.raises(InputError, match="not evaluated as this run had planned"):
        EvaluationState(planned, point).publish()
    settings = {"mode": "base", "dtype": "fp32", "device": "cpu"}
    where = {"point": point, "settings": settings, "tasks": ["a"], "benchmarks": point}
    with pytest.raises(InputError, match="not evaluated as this run had planned"):
        clean_up(**where, evaluation=planned.sha256)
    assert not (point / "manifest.json").exists()
    clean_up(**where, evaluation=make_spec().sha256)
    assert (point / "manifest.json").exists()


OPTIONS: dict[str, Any] = {
    "epochs": 2,
    "max_tokens": 3,
    "temperature": 0,
    "system_prompt": "",
    "prompt": "",
    "solver": "generate",
    "scorer": "match",
}


def test_options_of_a_task_make_another_evaluation_and_their_absence_none() -> None:
    task = {"name": "a", "task": "a.py", "args": {}, "limit": None}
    specs = [make_spec(tasks=[task | {key: value}]) for key, value in OPTIONS.items()]
    assert len({make_spec().sha256, *(spec.sha256 for spec in specs)}) == len(OPTIONS) + 1
    # What results that are there have on record.
    assert make_spec().sha256 == "5984d726294e765e5e6d856d05675e01cafc204e5ead3b2129fe35816931436b"
    for spec in specs:
        assert EvaluationSpec.model_validate_json(spec.model_dump_json()) == spec


def test_what_was_done_with_another_adapter_counts_for_nothing(point: Path) -> None:
    finish(point, make_spec())
    (point / "adapter/adapter_model.safetensors").write_bytes(b"others!")
    assert not EvaluationState(make_spec(), point).is_finished()


def test_what_was_begun_with_other_versions_is_begun_anew(point: Path) -> None:
    state = EvaluationState(make_spec(), point)
    state.begin(VERSIONS)
    state.get_log_dir("a").mkdir(parents=True)
    state.begin(VERSIONS)
    assert state.get_log_dir("a").exists()
    state.begin({"torch": "2"})
    assert not state.get_log_dir("a").exists()


def test_a_result_waits_to_be_published_and_counts_only_then(point: Path) -> None:
    state = finish(point, make_spec())
    assert state.is_finished()
    assert [file.name for file in (point / "eval").iterdir()] == ["reproduce.py"]
    assert not is_evaluated(make_spec(), point)
    state.publish()
    assert is_evaluated(make_spec(), point)
    assert is_evaluated(make_spec().model_copy(update={"base_model": "elsewhere"}), point)
    assert sorted(file.name for file in (point / "eval").iterdir()) == ["a.eval", "metrics.json", "reproduce.py"]
    assert not (point / "state/eval").exists()
    assert json.loads((point / "eval/metrics.json").read_text())["evaluation_sha256"] == make_spec().sha256


def test_a_published_result_can_be_published_again(point: Path) -> None:
    state = finish(point, make_spec())
    state.publish()
    state.keep()
    shutil.rmtree(point / "eval")
    state.publish()
    assert (point / "eval/a.eval").read_text() == "log"


def test_a_result_without_one_of_its_logs_is_none(point: Path) -> None:
    finish(point, make_spec()).publish()
    (point / "eval/a.eval").unlink()
    assert not EvaluationState(make_spec(), point).is_finished()
    assert not is_evaluated(make_spec(), point)


def test_why_there_is_no_result_is_said(point: Path) -> None:
    state = EvaluationState(make_spec(), point)
    state.fail("the adapter is corrupt")
    with pytest.raises(InputError, match="the adapter is corrupt"):
        state.publish()
