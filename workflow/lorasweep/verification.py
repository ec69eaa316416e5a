"""Whether what lies in a results folder is still what its manifests and its table speak of."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.digest import digest_file
from lorasweep.layout import MANIFEST

TABLE = "results.csv"


@dataclass(frozen=True)
class Mismatch:
    """A file, or a cell of the table, that is not what it should be."""

    path: Path
    what: str


def verify(results: Path) -> tuple[int, list[Mismatch]]:
    """Hash every file of every manifest below an experiment's folder; return how many there are, and what differs.

    A manifest lists recipe, adapter, full model, logs and metrics with their sha256. The table's `adapter_sha256` is
    compared with the manifest's, which is compared with the adapter's own file and with what the evaluation saw.
    """
    files = 0
    mismatches: list[Mismatch] = []
    rows = _read_table(results / TABLE)
    for path in sorted(results.glob(f"*/{MANIFEST}")):
        point = path.parent
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            listed = {point / entry["path"]: (entry["sha256"], entry["bytes"]) for entry in manifest["files"]}
            adapter_sha256 = manifest["adapter_sha256"]
            evaluated = (manifest["evaluation"].get("proof") or {}).get("adapter_sha256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            mismatches.append(Mismatch(path, f"is no manifest ({error!r})"))
            continue
        files += len(listed)
        for file, (sha256, size) in listed.items():
            mismatches += _compare(file, sha256, size)
        mismatches += _find_unlisted(point, listed)
        if evaluated not in (None, adapter_sha256):
            mismatches.append(Mismatch(path, f"evaluated is the adapter {evaluated}, kept is {adapter_sha256}"))
        said = {row["adapter_sha256"] or None for row in rows if row["point"] == point.name}
        if said - {adapter_sha256}:
            mismatches.append(
                Mismatch(
                    results / TABLE, f"{point.name} is of the adapter {min(map(str, said))}, kept is {adapter_sha256}"
                )
            )
    known = {path.parent.name for path in results.glob(f"*/{MANIFEST}")}
    mismatches += [
        Mismatch(results / TABLE, f"{name} has a row and no manifest")
        for name in sorted({row["point"] for row in rows} - known)
    ]
    return files, mismatches


def _compare(file: Path, sha256: str, size: int) -> Iterator[Mismatch]:
    if not file.is_file():
        yield Mismatch(file, "is missing")
    elif file.stat().st_size != size:
        yield Mismatch(file, f"has {file.stat().st_size} bytes, and had {size}")
    elif (found := digest_file(file)) != sha256:
        yield Mismatch(file, f"has the sha256 {found}, and had {sha256}")


def _find_unlisted(point: Path, listed: dict[Path, tuple[str, int]]) -> Iterator[Mismatch]:
    """Weights beside those of the manifest could be loaded for them."""
    for folder in ("adapter", "hf_model"):
        for file in sorted((point / folder).glob("*.safetensors")):
            if file not in listed:
                yield Mismatch(file, "is in no manifest")


def _read_table(file: Path) -> Sequence[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))
