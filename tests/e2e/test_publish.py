"""Finished experiments are compared, and their points published, as others find them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from hub_server import TOKEN, Hub, read_files, serve
from lorasweep.results.comparison import compare, read_experiments
from lorasweep.results.verification import verify
from lorasweep.util.errors import InputError
from sweep import POINTS, ROOT, RUN, Sweep, run_stage


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


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the base model; what this test starts asks it, with a home of its own."""
    with serve() as hub:
        hub.add("models/org/base", read_files(model) | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        for name, value in {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"),
        }.items():
            monkeypatch.setenv(name, value)
        yield hub


def publish(sweep: Sweep, mode: str, place: str | Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "workflow"), os.environ.get("PYTHONPATH")]))
    point = f"{sweep.results.name}/{POINTS[mode]}"
    command = [sys.executable, "-m", "lorasweep", "publish", point, "--to", str(place), *options]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        command, cwd=sweep.directory, env=environment, capture_output=True, encoding="utf-8", check=False
    )


def get_logits(base: str | Path, adapter: str | Path, merged: str | Path, output: Path) -> dict[str, Any]:
    arguments = ["--base", base, "--adapter", adapter, "--merged", merged, "--tokens", "5,6,7,8", "--output", output]
    run_stage("eval", "e2e/hf_logits.py", *arguments)
    return dict(load_file(output))


def test_an_adapter_goes_to_the_hub_and_is_loaded_from_there_with_the_same_logits(
    finished: Sweep, hub: Hub, tmp_path: Path
) -> None:
    commit = hub.repositories["models/org/base"].branches["main"]
    done = publish(finished, "B2", "hf://org/tiny", "--base-model", f"org/base@{commit}")
    assert done.returncode == 0, done.stderr
    published = hub.repositories["models/org/tiny"]
    files = published.commits[published.branches["main"]]
    assert len(published.commits) == 2  # an empty one, and one with everything
    assert TOKEN not in done.stdout + done.stderr
    assert not [name for name, data in files.items() if TOKEN.encode() in data]
    manifest = json.loads(files["manifest.json"])
    weights = files["adapter_model.safetensors"]
    assert sha256(weights).hexdigest() == manifest["adapter_sha256"]
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert {"eval/letters.eval", "eval/metrics.json", "eval/reproduce.py", "README.md"} <= set(files)
    assert not [
        name for name, data in files.items() if name[-5:] != ".eval" and str(finished.directory).encode() in data
    ]
    local = finished.results / POINTS["B2"] / "adapter"
    base = finished.directory / "model"
    before = get_logits(base, local, base, tmp_path / "before.safetensors")
    after = get_logits("org/base", "org/tiny", "org/base", tmp_path / "after.safetensors")
    for name in ("peft", "transformers"):
        assert np.array_equal(before["peft"], after[name])
    assert not np.array_equal(after["base"], after["peft"])


def test_a_failed_upload_commits_nothing_and_a_repository_with_files_is_refused(finished: Sweep, hub: Hub) -> None:
    for place in ("/lfs/", "/commit/main"):
        hub.refused = place
        done = publish(finished, "B1", "hf://org/tiny", "--private")
        assert done.returncode == 1
        assert "--to: hf://org/tiny@main: the upload failed (" in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        tiny = hub.repositories["models/org/tiny"]
        assert list(tiny.commits[tiny.branches["main"]]) == [".gitattributes"]
        assert tiny.is_private
    hub.refused = ""
    assert publish(finished, "B1", "hf://org/tiny").returncode == 0
    done = publish(finished, "B1", "hf://org/tiny")
    assert done.returncode == 1
    assert "--to: hf://org/tiny@main: it has files already (README.md, adapter_config.json, " in done.stderr


def test_who_may_not_write_is_told_so(finished: Sweep, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ofAnother")
    done = publish(finished, "B1", "hf://org/tiny")
    assert done.returncode == 1
    assert "the token in HF_TOKEN has no access to it" in done.stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "HF_TOKEN is not set" in publish(finished, "B1", "hf://org/tiny").stderr
    assert "models/org/tiny" not in hub.repositories


@pytest.mark.parametrize("mode", ["A", pytest.param("B1", marks=pytest.mark.long), "B2"])
def test_a_published_folder_is_verified_and_evaluated_again_by_whoever_has_it(
    finished: Sweep, tmp_path: Path, mode: str
) -> None:
    folder = tmp_path / "published"
    done = publish(finished, mode, folder)
    assert done.returncode == 0, done.stderr
    point = finished.results / POINTS[mode]
    top = "hf_model/model.safetensors" if mode == "A" else "adapter/adapter_model.safetensors"
    assert (folder / Path(top).name).read_bytes() == (point / top).read_bytes()
    assert not [file for file in folder.rglob("*") if file.is_symlink()]
    files, mismatches = verify(folder)
    assert mismatches == []
    assert files == len([file for file in folder.rglob("*") if file.is_file()]) - 2  # the card and the manifest
    (tmp_path / "elsewhere").mkdir()
    for name in ("model", "tasks.py"):
        place = tmp_path / "elsewhere" / ("tasks.py" if name == "tasks.py" else "base")
        place.symlink_to(finished.directory / name)
    command = [RUN, "eval", folder / "eval/reproduce.py", "--base", "base"]
    again = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, encoding="utf-8", check=False)
    assert again.stdout.endswith("The scores are those recorded.\n"), again.stdout + again.stderr
    assert again.returncode == 0
