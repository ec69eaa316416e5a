"""Finished experiments are compared, and their points published, as others find them."""

import json
from pathlib import Path

import pytest

from lorasweep.results.comparison import compare, read_experiments
from lorasweep.util.errors import InputError
from sweep import Sweep


def test_finished_experiments_are_compared_by_what_their_evaluations_recorded(finished: Sweep, tmp_path: Path) -> None:
    other = finished.copy(tmp_path / "elsewhere")
    name = finished.results.name
    [made] = compare(read_experiments([finished.results, other.results]), None, None)
    assert len(made.rows) == 8
    [pair] = made.pairs
    assert (pair.difference.value, pair.difference.pairs, pair.p_adjusted) == (0, 6, 1)
    said = finished.call("compare", other.results, "--page", tmp_path / "page.html")
    assert "p = 1: not significant." in " ".join(said.split())
    for file in other.results.glob("*/manifest.json"):
        manifest = json.loads(file.read_text())
        manifest["evaluation"]["spec"]["files"]["tasks.py"] = "0" * 64
        file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=f"the file tasks.py differs between .*{name} and .*{name}"):
        compare(read_experiments([finished.results, other.results]), None, None)
