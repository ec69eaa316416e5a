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
def inherited(finished: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A copy of the finished sweep in another place."""
    sweep = finished.copy(tmp_path_factory.mktemp("inherited") / "a" / "colleague's")
    shutil.copytree(sweep.results / POINTS["B2"], sweep.results / CHANGED)
    metrics = sweep.results / CHANGED / "eval/metrics.json"
    record = json.loads(metrics.read_text())
    record["tasks"]["letters"]["scores"]["match/accuracy"] += 0.25
    metrics.write_text(json.dumps(record))
    return sweep


def call_page(sweep: Sweep, point: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Call a point's page, which is to write nothing anywhere."""
    before = read_files(sweep.results)
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "HOME": str(folder / "home"), "TMPDIR": str(scratch)}
    command = [RUN, "eval", Path("results", sweep.results.name, point, "eval/reproduce.py")]
    done = subprocess.run(command, cwd=sweep.directory, env=environment, capture_output=True, text=True, check=False)
    assert read_files(sweep.results) == before
    assert read_files(scratch) == {}
    return done


@pytest.mark.parametrize("name", ["B2", *(pytest.param(name, marks=pytest.mark.long) for name in ("A", "B1", "base"))])
def test_a_page_finds_the_scores_that_were_recorded(
    inherited: Sweep, finished: Sweep, tmp_path: Path, name: str
) -> None:
    point = POINTS.get(name, "baseline")
    said = call_page(inherited, point, tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    assert said.stdout.endswith("The scores are those recorded.\n")
    metrics = json.loads((finished.results / point / "eval/metrics.json").read_text())
    accuracy = metrics["tasks"]["letters"]["scores"]["match/accuracy"]
    assert said.stdout.count(f"\n  letters match/accuracy: {accuracy}\n") == 2
    head = (finished.results / point / "eval/reproduce.py").read_text().partition("import")[0]
    assert f"CLONE/scripts/run eval results/{finished.results.name}/{point}/eval/reproduce.py" in head
    [versions] = re.findall(r"^# versions: (.+)$", head, flags=re.MULTILINE)
    assert set(versions.split(", ")) == {f"{package} {version}" for package, version in metrics["versions"].items()}
    assert str(finished.directory) not in (finished.results / point / "eval/reproduce.py").read_text()


def test_a_page_says_that_a_score_is_another(inherited: Sweep, tmp_path: Path) -> None:
    said = call_page(inherited, CHANGED, tmp_path)
    assert said.returncode == 1
    assert said.stdout.endswith("The scores are not those recorded.\n")
