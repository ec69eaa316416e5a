"""The command `lorasweep`: its words are found, explain themselves, and say in a line what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep.cli.main import JOBS, WORDS
from made_results import collect, make_results
from sweep import ROOT


def call(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow"), "COLUMNS": "120"}
    command = [sys.executable, "-m", "lorasweep", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("word", sorted(set(WORDS) - {"job"}))
def test_each_word_explains_itself(word: str) -> None:
    done = call(word, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: lorasweep {word} ")
    assert f"  {word}" in call("--help").stdout


def test_what_rules_run_has_words_of_its_own() -> None:
    said = call("job", "--help").stdout
    assert all(f"  {word}" in said for word in JOBS)
    done = call("job", "publish", "--help")
    assert done.stdout.startswith("usage: lorasweep job publish ")


def test_the_answer_and_the_table_are_shown_by_the_file_or_by_the_folder(tmp_path: Path) -> None:
    results = tmp_path / "results/ranks"
    make_results(results, {"lora_rank": [4, 8]}, lambda settings: settings["lora_rank"] / 10)
    collect(results, ["lora_rank"])
    shown = call("show", "results/ranks", cwd=tmp_path)
    assert shown.returncode == 0
    assert "lora_rank=8" in shown.stdout
    assert "Every sample: " in shown.stdout
    assert call("show", "results/ranks/experiment.yaml", cwd=tmp_path).stdout == shown.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "my.yaml: no such file. Expected: an experiment's file"),
        ("a: [1\n", "my.yaml:2:1: not YAML: "),
        ("- a\n", "my.yaml: not an experiment. Expected: YAML with the keys of config/README.md"),
        ("experiment: {name: x}\n", "my.yaml: the key 'model.path' is missing"),
        (
            "experiment: {name: x}\nmodel: {path: y}\n",
            "results/x: no table of results yet; 'lorasweep status' shows how",
        ),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    refused = call("show", "my.yaml", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr.startswith(said)
    assert "Traceback" not in refused.stderr
