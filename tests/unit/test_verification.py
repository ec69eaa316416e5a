"""Verification: files and table against the manifests."""

import csv
import json
from hashlib import sha256
from pathlib import Path

import pytest

from lorasweep.verification import verify


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for point in ("a", "b"):
        entries = []
        for name in ("adapter/adapter_model.safetensors", "eval/task.eval"):
            file = tmp_path / point / name
            file.parent.mkdir(parents=True)
            file.write_text(f"{point} {name}")
            digest = sha256(file.read_bytes()).hexdigest()
            entries.append({"path": name, "sha256": digest, "bytes": file.stat().st_size})
        adapter = entries[0]["sha256"]
        manifest = {"adapter_sha256": adapter, "evaluation": {"proof": {"adapter_sha256": adapter}}, "files": entries}
        (tmp_path / point / "manifest.json").write_text(json.dumps(manifest))
    write_table(tmp_path)
    return tmp_path


def write_table(results: Path, **changes: str) -> None:
    with (results / "results.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["point", "adapter_sha256"])
        writer.writeheader()
        for point in ("a", "b"):
            manifest = json.loads((results / point / "manifest.json").read_text())
            writer.writerow({"point": point, "adapter_sha256": changes.get(point, manifest["adapter_sha256"])})


def say(results: Path) -> list[str]:
    return [f"{mismatch.path.relative_to(results)}: {mismatch.what}" for mismatch in verify(results)[1]]


def test_an_untouched_folder_matches(results: Path) -> None:
    assert verify(results) == (4, [])


def test_every_change_is_named(results: Path) -> None:
    weights = results / "a/adapter/adapter_model.safetensors"
    size = weights.stat().st_size
    weights.write_text("x" * size)
    (results / "b/eval/task.eval").write_text("short")
    (results / "b/adapter/other.safetensors").touch()
    (results / "a/eval/task.eval").unlink()
    said = say(results)
    assert len(said) == 4
    assert said[0].startswith("a/adapter/adapter_model.safetensors: has the sha256 ")
    assert said[1] == "a/eval/task.eval: is missing"
    assert said[2] == "b/eval/task.eval: has 5 bytes, and had 16"
    assert said[3] == "b/adapter/other.safetensors: is in no manifest"


def test_a_row_of_another_adapter_or_of_none_is_named(results: Path) -> None:
    write_table(results, a="another")
    assert say(results)[0].startswith("results.csv: a is of the adapter another, kept is ")
    (results / "b/manifest.json").unlink()
    assert "results.csv: b has a row and no manifest" in say(results)
    (results / "a/manifest.json").write_text("{}")
    assert any(line.startswith("a/manifest.json: is no manifest") for line in say(results))
