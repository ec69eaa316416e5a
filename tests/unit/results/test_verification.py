"""Verification: files and table against the manifests."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lorasweep.results.verification import verify


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for point in ("a", "b"):
        entries: list[dict[str, Any]] = []
        digests: dict[str, str] = {}

        def add(name: str, folder: Path = tmp_path / point, entries: list[Any] = entries) -> str:
            file = folder / name
            digest = sha256(file.read_bytes()).hexdigest()
            entries.append({"path": name, "sha256": digest, "bytes": file.stat().st_size})
            return digest

        for name in ("adapter/adapter_model.safetensors", "eval/task.eval", "recipe.yaml"):
            (tmp_path / point / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / point / name).write_text(f"{point} {name}")
            digests[name] = add(name)
        adapter = entries[0]["sha256"]
        scores = {"match/accuracy": 1 / 3, "match/stderr": 0.1}
        evaluation = {
            "proof": {"adapter_sha256": adapter, "base_model_fingerprint": "base"},
            "tasks": {"letters": {"samples": 6, "scores": scores}, "other": {"samples": 6, "scores": {"f1/mean": 1.0}}},
        }
        training = {"recipe_sha256": digests["recipe.yaml"], "final_loss": 0.5}
        for name, record in {"adapter/lorasweep.json": training, "eval/metrics.json": evaluation}.items():
            (tmp_path / point / name).write_text(json.dumps(record))
            add(name)
        manifest = {
            "adapter_sha256": adapter,
            "merged_weights_sha256": "merged",
            "training": training,
            "evaluation": evaluation,
            "files": entries,
        }
        (tmp_path / point / "manifest.json").write_text(json.dumps(manifest))
    write_table(tmp_path)
    return tmp_path


def write_table(results: Path, **changes: dict[str, str]) -> None:
    """Write the table of what the manifests say; `changes` to the row of a point and of the task `letters`."""
    rows: list[dict[str, Any]] = []
    for point in ("a", "b"):
        manifest = json.loads((results / point / "manifest.json").read_text())
        for task, scored in manifest["evaluation"]["tasks"].items():
            row = {"point": point, "task": task, **scored["scores"], "match/accuracy:low": 0.1}
            row |= {"adapter_sha256": manifest["adapter_sha256"], "base_model_fingerprint": "base"}
            rows.append(
                row | {"merged_weights_sha256": "merged"} | (changes.get(point, {}) if task == "letters" else {})
            )
    pd.DataFrame(rows).convert_dtypes().to_csv(results / "results.csv", index=False)


def say(results: Path) -> list[str]:
    return [f"{mismatch.path.relative_to(results)}: {mismatch.what}" for mismatch in verify(results)[1]]


def test_an_untouched_folder_matches(results: Path) -> None:
    assert verify(results) == (10, [])


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
    assert said[2] == "b/eval/task.eval: has 5 bytes, but the manifest says 16"
    assert said[3] == "b/adapter/other.safetensors: is not in the manifest"


def test_a_row_of_another_adapter_or_of_none_is_named(results: Path) -> None:
    write_table(results, a={"adapter_sha256": "another", "base_model_fingerprint": "", "merged_weights_sha256": "x"})
    said = say(results)
    assert len(said) == 3
    assert said[0].startswith("results.csv: a: adapter_sha256 is another, but the manifest says ")
    assert said[1] == "results.csv: a: base_model_fingerprint is empty, but the manifest says base"
    assert said[2] == "results.csv: a: merged_weights_sha256 is x, but the manifest says merged"
    (results / "b/manifest.json").unlink()
    assert "results.csv: b has a row but no manifest" in say(results)
    (results / "a/manifest.json").write_text("{}")
    assert any(line.startswith("a/manifest.json: is not a valid manifest") for line in say(results))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"match/accuracy": "0.33"}, "a, letters: match/accuracy is 0.33, but the manifest says 0.3333333333333333"),
        ({"match/stderr": ""}, "a, letters: match/stderr is empty, but the manifest says 0.1"),
        ({"match/stderr": "n/a"}, "a, letters: match/stderr is n/a, but the manifest says 0.1"),
        ({"f1/mean": "1.0"}, "a, letters: f1/mean is 1.0, but the manifest says None"),
        ({"task": "unknown"}, "a: has a row of the task unknown, which is not in the manifest"),
    ],
)
def test_a_number_that_was_edited_is_named(results: Path, change: dict[str, str], said: str) -> None:
    write_table(results, a=change)
    assert say(results) == [f"results.csv: {said}"]


def test_a_manifest_that_was_edited_along_with_the_table_is_named(results: Path) -> None:
    file = results / "a/manifest.json"
    manifest = json.loads(file.read_text())
    manifest["evaluation"]["tasks"]["letters"]["scores"]["match/accuracy"] = 1.0
    file.write_text(json.dumps(manifest))
    write_table(results)
    assert say(results) == [f"a/manifest.json: 'evaluation' differs from {results}/a/eval/metrics.json"]


def test_a_recipe_that_the_adapter_was_not_trained_by_is_named(results: Path) -> None:
    recipe = results / "a/recipe.yaml"
    recipe.write_text("lr: 1")
    file = results / "a/manifest.json"
    manifest = json.loads(file.read_text())
    entry = next(entry for entry in manifest["files"] if entry["path"] == "recipe.yaml")
    entry |= {"sha256": sha256(b"lr: 1").hexdigest(), "bytes": 5}
    file.write_text(json.dumps(manifest))
    assert len(say(results)) == 1
    assert say(results)[0].startswith(
        f"a/recipe.yaml: has the sha256 {entry['sha256']}, but the adapter was trained with "
    )
