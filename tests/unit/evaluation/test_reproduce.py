"""The page that runs an evaluation again: when it is written, and what it says of the scores."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from evaluation_specs import make_spec
from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.reproduce import compare, read_arguments, write_reproduction
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.util.errors import InputError
from lorasweep.util.versions import get_versions
from plain_checkpoint import write_checkpoint

SCORES = {"a": {"match/accuracy": 0.5, "match/stderr": float("nan")}}


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A point of a working directory with a model and a task."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("m"))
    Path("a.py").write_text("")
    point = Path("results/x/p")
    (point / "adapter").mkdir(parents=True)
    (point / "adapter/adapter_model.safetensors").write_bytes(b"weights")
    return point


@pytest.fixture
def spec(point: Path) -> EvaluationSpec:
    return make_spec(base_fingerprint=read_checkpoint(Path("m")).fingerprint, files={"a.py": sha256(b"").hexdigest()})


def record(spec: EvaluationSpec, point: Path, scores: dict[str, Any] = SCORES, **versions: str) -> None:
    state = EvaluationState(spec, point)
    state.begin({})
    log = state.get_log_dir("a") / "1.eval"
    log.parent.mkdir(parents=True)
    log.write_text("log")
    tasks = {task: {"scores": result} for task, result in scores.items()}
    state.finish({"a": log}, {"tasks": tasks, "versions": get_versions("pydantic") | versions})
    state.publish()


@pytest.mark.parametrize(
    ("mode", "backend"), [("A", "hf"), ("B1", "hf"), ("B2", "hf"), ("base", "hf"), ("B2", "vllm"), ("base", "vllm")]
)
def test_a_page_is_whole_and_names_what_it_evaluates(point: Path, mode: Any, backend: Any) -> None:
    spec = make_spec(mode=mode, backend=backend, system_prompt='It\'s "$x"\n\\', prompt="{input}")
    write_reproduction(spec, point, {"torch": "2.13.0"})
    page = point / "eval/reproduce.py"
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "--ignore", "F401", page]
    assert subprocess.run(command, check=False).returncode == 0
    text = page.read_text()
    named = [f"({mode})" if mode != "base" else "the base model alone", "# base:     m\n", "# tasks:    a.py\n"]
    named += ["# versions: torch 2.13.0\n", f"scripts/run {'vllm' if backend == 'vllm' else 'eval'} {page} ["]
    named.append("# options:  dtype fp32, device cpu, max_connections 4, max_tokens 4, temperature 0.0, seed 0\n")
    for part in [*named, "# adapter:  none\n" if mode == "base" else f"# adapter:  {point}/adapter\n"]:
        assert part in text
    literal = text.partition("model_validate(")[2].partition("\n)\n")[0]
    assert EvaluationSpec.model_validate(eval(literal.strip())) == spec


def test_the_page_is_there_from_the_beginning_of_an_evaluation_and_after_its_failure(
    point: Path, spec: EvaluationSpec
) -> None:
    state = EvaluationState(spec, point)
    state.begin({"torch": "1"})
    state.fail("told to fail")
    assert "torch 1" in (point / "eval/reproduce.py").read_text()
    state.begin({"torch": "2"})
    assert "torch 2" in (point / "eval/reproduce.py").read_text()


def test_scores_are_compared_with_those_that_the_point_records(
    point: Path, spec: EvaluationSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    record(spec, point)
    assert compare(spec, point, SCORES)
    said = capsys.readouterr().out
    assert said.count("  a match/accuracy: 0.5\n") == 2
    assert said.endswith("The scores are those recorded.\n")
    assert not compare(spec, point, {"a": {**SCORES["a"], "match/accuracy": 0.6}})
    assert capsys.readouterr().out.endswith("The scores are not those recorded.\n")


def test_without_a_record_of_this_evaluation_scores_are_not_confirmed(
    point: Path, spec: EvaluationSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not compare(spec, point, SCORES)
    record(make_spec(seed=1), point)
    assert not compare(spec, point, SCORES)
    assert capsys.readouterr().out.count("p: no scores of this evaluation are recorded\n") == 2


def test_what_changed_since_is_named_with_scores_that_differ(
    point: Path, spec: EvaluationSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    record(spec, point, pydantic="0", gone="1")
    Path("a.py").write_text("changed")
    (point / "adapter/adapter_model.safetensors").write_bytes(b"others")
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps({**config, "changed": True}))
    read_checkpoint.cache_clear()
    assert not compare(spec, point, {})
    said = capsys.readouterr().out
    changes = [line.removeprefix("Changed since: ") for line in said.splitlines() if line.startswith("Changed since")]
    assert changes[:3] == ["the base model m", f"{point}/adapter/adapter_model.safetensors", "a.py"]
    assert changes[3] == "gone 1, now not installed"
    assert changes[4].startswith("pydantic 0, now ")
    assert len(changes) == 5


def test_a_folder_with_logs_of_an_earlier_call_confirms_no_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inspect would take those logs for its own."""
    monkeypatch.setattr(sys, "argv", ["reproduce.py", str(tmp_path / "logs"), "--base", "elsewhere"])
    for _ in range(2):  # a folder that is not there, and an empty one
        spec, logs = read_arguments(make_spec())
        assert (spec.base_model, logs) == ("elsewhere", tmp_path / "logs")
        logs.mkdir(exist_ok=True)
    (tmp_path / "logs/a").mkdir()
    with pytest.raises(InputError, match="logs: exists, and is not an empty folder"):
        read_arguments(make_spec())


def test_of_an_adopted_adapter_another_configuration_is_named(
    point: Path, spec: EvaluationSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    config = point / "adapter/adapter_config.json"
    config.write_text(json.dumps({"lora_alpha": 8}))
    known = {"adopted_sha256": sha256(b"weights").hexdigest(), "adopted_config_sha256": digest_config(config.parent)}
    (point / "adapter/lorasweep.json").write_text(json.dumps(known))
    record(spec, point)
    config.write_text(json.dumps({"lora_alpha": 80}))
    assert not compare(spec, point, {})
    assert capsys.readouterr().out.endswith(f"Changed since: {config}\n")
