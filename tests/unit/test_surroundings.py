"""What stands in the environment of whoever calls changes neither files nor jobs."""

import ast
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def see_environment_of_a_job(given: Mapping[str, str]) -> dict[str, str]:
    """Return what a script would have that scripts/run starts; `env` stands in Python's place."""
    environment = {**os.environ, "LORASWEEP_CONDA": "", "LORASWEEP_DRIVER": "env", **given}
    done = subprocess.run(
        [ROOT / "scripts/run", "driver"], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    return dict(line.partition("=")[::2] for line in done.stdout.splitlines())


def test_threads_of_a_job_that_wait_leave_the_core_to_others_unless_told_otherwise() -> None:
    assert see_environment_of_a_job({"OMP_WAIT_POLICY": ""})["OMP_WAIT_POLICY"] == "passive"
    assert see_environment_of_a_job({"OMP_WAIT_POLICY": "active"})["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize("name", ["PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_job_is_of_no_other_python_and_of_no_other_distributed_program(name: str) -> None:
    assert name not in see_environment_of_a_job({name: "7"})


def test_a_job_reads_and_writes_utf8_whatever_the_language() -> None:
    assert see_environment_of_a_job(ASCII)["PYTHONUTF8"] == "1"


CODE = sorted(file for folder in ("workflow/lorasweep", "scripts", "demo") for file in (ROOT / folder).rglob("*.py"))


def find_texts_of_any_encoding(code: str) -> list[str]:
    """Return calls that open a text in whatever encoding the shell's language has."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    found = []
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        constants = [str(node.value) for node in call.args if isinstance(node, ast.Constant)]
        is_text = (
            name in ("read_text", "write_text")
            or (name == "open" and ast.unparse(call.func) != "os.open" and not any("b" in c for c in constants))
            or (name in ("NamedTemporaryFile", "TemporaryFile") and "w" in constants)
            or any(keyword.arg == "text" and ast.unparse(keyword.value) == "True" for keyword in call.keywords)
        )
        if is_text and not any(keyword.arg == "encoding" for keyword in call.keywords):
            found.append(ast.unparse(call))
    return found


@pytest.mark.parametrize("code", ["file.read_text()", "open(file)", "file.open('w')", "run(command, text=True)"])
def test_a_text_of_any_encoding_would_be_found(code: str) -> None:
    assert find_texts_of_any_encoding(code) == [code]
    assert not find_texts_of_any_encoding(code.replace(")", ", encoding='utf-8')").replace("(,", "("))


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_text_says_its_encoding_since_that_of_the_shells_language_may_be_ascii(file: Path) -> None:
    if file.name != "make_venv.py":  # it reads what installers print, which is of the shell's
        assert find_texts_of_any_encoding(file.read_text(encoding="utf-8")) == []
