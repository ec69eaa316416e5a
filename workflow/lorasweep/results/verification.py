"""Verify that the files in a results folder match its manifests and its table."""

import csv
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.layout import MANIFEST, METRICS, RECORD, TABLE, find_part
from lorasweep.results.manifest import describe_adapter_difference
from lorasweep.util.digest import digest_file


@dataclass(frozen=True)
class Mismatch:
    """A file or a cell of the table that differs from its record."""

    path: Path
    what: str


def verify(results: Path) -> tuple[int, list[Mismatch]]:
    """Check every file in the manifests of an experiment, or of a published point; return their number, and mismatches.

    A manifest lists recipe, adapter, full model, logs and metrics with their sha256. These are compared too: the
    manifest's `training` and `evaluation` with the records beside the files, the adapter's configuration with the
    settings, the recipe with that of the adapter's record, and the table's metrics and digests with the manifest.
    """
    files = 0
    mismatches: list[Mismatch] = []
    rows = _read_table(results / TABLE)
    # A published point is alone in its folder.
    manifests = [results / MANIFEST] if (results / MANIFEST).is_file() else sorted(results.glob(f"*/{MANIFEST}"))
    for path in manifests:
        point = path.parent
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            listed = {point / entry["path"]: (entry["sha256"], entry["bytes"]) for entry in manifest["files"]}
            kept = _get_digests(manifest)
            tasks = manifest["evaluation"].get("tasks", {})
            scores = {task: dict(result["scores"]) for task, result in tasks.items()}
            evaluated = (manifest["evaluation"].get("proof") or {}).get("adapter_sha256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            mismatches.append(Mismatch(path, f"is not a valid manifest ({error!r})"))
            continue
        files += len(listed)
        for file, (sha256, size) in listed.items():
            mismatches += _compare(file, sha256, size)
        mismatches += _find_unlisted(point, listed)
        mismatches += _compare_records(path, manifest, listed)
        if evaluated not in (None, kept["adapter_sha256"]):
            what = f"the evaluated adapter is {evaluated}, but the kept one is {kept['adapter_sha256']}"
            mismatches.append(Mismatch(path, what))
        for row in rows:
            if row["point"] == point.name:
                mismatches += [Mismatch(results / TABLE, what) for what in _compare_row(row, kept, scores)]
    points = {path.parent.name for path in manifests}
    mismatches += [
        Mismatch(results / TABLE, f"{name} has a row but no manifest")
        for name in sorted({row["point"] for row in rows} - points)
    ]
    return files, mismatches


def _get_digests(manifest: dict[str, Any]) -> dict[str, str | None]:
    """Return the digests in a manifest that the table repeats, by column."""
    proof = manifest["evaluation"].get("proof") or {}
    return {
        "adapter_sha256": manifest["adapter_sha256"],
        "base_model_fingerprint": proof.get("base_model_fingerprint"),
        "merged_weights_sha256": manifest.get("merged_weights_sha256"),
    }


def _compare_records(path: Path, manifest: dict[str, Any], listed: Collection[Path]) -> Iterator[Mismatch]:
    """Compare a manifest with the two records that it repeats, and the recipe with that of the adapter's record."""
    point = path.parent
    adapter = find_part(point, "adapter")
    for file, key in ((adapter / RECORD, "training"), (point / "eval" / METRICS, "evaluation")):
        if file not in listed or not file.is_file():
            continue
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            record = None
        if record != manifest.get(key):
            yield Mismatch(path, f"'{key}' differs from {file}")
    settings = manifest.get("settings") or {}
    if "lora_rank" in settings and (difference := describe_adapter_difference(adapter, settings)):
        yield Mismatch(path, difference)
    recorded = (manifest.get("training") or {}).get("recipe_sha256")
    recipe = point / "recipe.yaml"
    if recipe in listed and recipe.is_file() and (digest := digest_file(recipe)) != recorded:
        yield Mismatch(recipe, f"has the sha256 {digest}, but the adapter was trained with {recorded}")


def _compare_row(
    row: Mapping[str, str], kept: Mapping[str, str | None], scores: Mapping[str, Mapping[str, float]]
) -> Iterator[str]:
    """Compare a row of the table with the manifest, cell by cell. A metric's column is called `<score>/<metric>`."""
    name = row["point"]
    for column, digest in kept.items():
        if column in row and (row[column] or None) != digest:
            yield f"{name}: {column} is {row[column] or 'empty'}, but the manifest says {digest}"
    task = row.get("task") or None
    if task and task not in scores:
        yield f"{name}: has a row of the task {task}, which is not in the manifest"
        return
    expected = scores.get(task, {}) if task else {}
    metrics = {column for column in row if "/" in column and ":" not in column}
    for column in sorted(metrics | set(expected)):
        cell, value = row.get(column, ""), expected.get(column)
        if not _is_same(cell, value):
            yield f"{name}, {task}: {column} is {cell or 'empty'}, but the manifest says {value}"


def _is_same(cell: str, value: float | None) -> bool:
    """Whether a cell of the table is a number, up to rounding. An empty cell stands for `None` or NaN."""
    if not cell:
        return value is None or math.isnan(value)
    try:
        return value is not None and math.isclose(float(cell), value, rel_tol=1e-9, abs_tol=1e-12)
    except ValueError:
        return False


def _compare(file: Path, sha256: str, size: int) -> Iterator[Mismatch]:
    if not file.is_file():
        yield Mismatch(file, "is missing")
    elif file.stat().st_size != size:
        yield Mismatch(file, f"has {file.stat().st_size} bytes, but the manifest says {size}")
    elif (digest := digest_file(file)) != sha256:
        yield Mismatch(file, f"has the sha256 {digest}, but the manifest says {sha256}")


def _find_unlisted(point: Path, listed: dict[Path, tuple[str, int]]) -> Iterator[Mismatch]:
    """Yield weights that the manifest does not list, since they could be loaded by mistake."""
    for folder in dict.fromkeys(find_part(point, part) for part in ("adapter", "hf_model")):
        for file in sorted(folder.glob("*.safetensors")):
            if file not in listed:
                yield Mismatch(file, "is not in the manifest")


def _read_table(file: Path) -> Sequence[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))
