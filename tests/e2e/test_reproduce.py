"""Each point's `eval/reproduce.py` runs its evaluation again, also in a results folder that somebody inherited."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hub_server import read_files
from sweep import POINTS, RUN, Sweep

CHANGED = "changed"
"""A copy of a point, under another name, whose recorded score is another."""


@pytest.fixture(scope="module")
def said(finished: Sweep, tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What the page of each point says when it is called on a copy of the finished sweep in another place."""
    folder = tmp_path_factory.mktemp("inherited")
    sweep = finished.copy(folder / "a" / "colleague's")
    results = Path("results", sweep.results.name)
    shutil.copytree(sweep.results / POINTS["B2"], sweep.results / CHANGED)
    metrics = sweep.results / CHANGED / "eval/metrics.json"
    record = json.loads(metrics.read_text())
    record["tasks"]["letters"]["scores"]["match/accuracy"] += 0.25
    metrics.write_text(json.dumps(record))
    before = read_files(sweep.results)
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(scratch)}
    done = {}
    for point in (*POINTS.values(), "baseline", CHANGED):
        command = [RUN, "eval", results / point / "eval/reproduce.py"]
        done[point] = subprocess.run(
            command, cwd=sweep.directory, env=environment, capture_output=True, text=True, check=False
        )
    assert read_files(sweep.results) == before
    assert read_files(scratch) == {}
    return done


@pytest.mark.parametrize("name", [*POINTS, "base"])
def test_a_page_finds_the_scores_that_were_recorded(
    said: dict[str, subprocess.CompletedProcess[str]], finished: Sweep, name: str
) -> None:
    point = POINTS.get(name, "baseline")
    assert said[point].returncode == 0, said[point].stdout + said[point].stderr
    assert said[point].stdout.endswith("The scores are those recorded.\n")
    metrics = json.loads((finished.results / point / "eval/metrics.json").read_text())
    accuracy = metrics["tasks"]["letters"]["scores"]["match/accuracy"]
    assert said[point].stdout.count(f"\n  letters match/accuracy: {accuracy}\n") == 2
    head = (finished.results / point / "eval/reproduce.py").read_text().partition("import")[0]
    assert f"CLONE/scripts/run eval results/{finished.results.name}/{point}/eval/reproduce.py" in head
    [versions] = re.findall(r"^# versions: (.+)$", head, flags=re.MULTILINE)
    assert set(versions.split(", ")) == {f"{package} {version}" for package, version in metrics["versions"].items()}
    assert str(finished.directory) not in (finished.results / point / "eval/reproduce.py").read_text()


def test_a_page_says_that_a_score_is_another(said: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert said[CHANGED].returncode == 1
    assert said[CHANGED].stdout.endswith("The scores are not those recorded.\n")
