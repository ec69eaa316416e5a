"""What others need to use and check a point: its weights, a model card, its logs, `reproduce.py` and its manifest.

The adapter of a point, or its full model in mode A, is at the top, where PEFT, transformers and vLLM look for it.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.layout import ADAPTER_CONFIG, CARD, MANIFEST, METRICS, RECORD, REPRODUCTION
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import write_record


@dataclass(frozen=True)
class Base:
    """The base model of a published point."""

    name: str
    """Its name on the hub, or the name of its folder."""
    revision: str | None
    """Its commit or branch on the hub, if that is known."""
    is_on_hub: bool
    path: str
    """Where it was for the training, as the point's records have it."""


def read_manifest(point: Path) -> dict[str, Any]:
    """Return the manifest of a point with weights of its own.

    Raises:
        InputError: the folder is no point, or a baseline, or its point is not finished.
    """
    file = point / MANIFEST
    if not file.is_file():
        raise InputError(f"{point}: no finished point: it has no {MANIFEST}", "results/<experiment>/<point>")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if manifest["mode"] == "base":
        raise InputError(f"{point}: a baseline has no weights of its own", "a point with an adapter")
    return manifest


def gather(point: Path, manifest: Mapping[str, Any], folder: Path, base: Base, *, has_logs: bool, links: bool) -> None:
    """Put the files of a point into an empty folder, with a manifest of them, but without its card.

    In the point's own records, an absolute path of a base model becomes its name, and that of an adopted adapter the
    name of its folder. Weights, tokenizer and logs are byte for byte those of the manifest.

    Args:
        point: The point's folder.
        manifest: Its manifest.
        folder: The folder to fill.
        base: The base model.
        has_logs: Whether Inspect's logs, which have the samples, are published.
        links: Whether files that stay as they are become symbolic links and not copies.

    Raises:
        InputError: a file is missing, or differs from the manifest.
    """
    replaced = _find_paths(point, manifest, base)
    changed: dict[str, Callable[[str], str]] = {
        ADAPTER_CONFIG: lambda text: _name_base(text, base),
        **{name: lambda text: _replace(text, replaced) for name in (RECORD, METRICS, REPRODUCTION)},
    }
    entries = []
    for entry in manifest["files"]:
        name = _place(entry["path"], manifest["mode"])
        if name is None or (not has_logs and name.endswith(".eval")):
            continue
        source, target = point / entry["path"], folder / name
        if not source.is_file() or digest_file(source) != entry["sha256"]:
            problem = "differs from its manifest" if source.is_file() else "is missing"
            raise InputError(f"{source}: {problem}; 'lorasweep verify' lists such files")
        target.parent.mkdir(parents=True, exist_ok=True)
        if change := changed.get(target.name):
            target.write_text(change(source.read_text(encoding="utf-8")), encoding="utf-8")
        elif links:
            target.symlink_to(source.resolve())
        else:
            shutil.copyfile(source, target)
        sha256 = digest_file(target)
        if target.name not in changed and sha256 != entry["sha256"]:
            raise InputError(f"{source}: has changed while it was copied")
        entries.append({"path": name, "bytes": target.stat().st_size, "sha256": sha256})
    published = json.loads(_replace(json.dumps(manifest), replaced)) | {"files": entries}
    write_record(folder / MANIFEST, published)


def _place(path: str, mode: str) -> str | None:
    """Return where a file of a point is published; `None` if it is not. Of mode A, the full model is at the top."""
    top = "hf_model" if mode == "A" else "adapter"
    part, _, rest = path.partition("/")
    if rest and part == top:
        return None if rest == CARD else rest
    return path if part in ("adapter", "eval") else None


def _name_base(text: str, base: Base) -> str:
    config = json.loads(text) | {"base_model_name_or_path": base.name, "revision": base.revision}
    return json.dumps(config, indent=1, sort_keys=True) + "\n"


def _find_paths(point: Path, manifest: Mapping[str, Any], base: Base) -> dict[str, str]:
    """Return what stands in a point's records and belongs to this machine, with what is published in its place."""
    training, proof = manifest["training"], manifest["evaluation"].get("proof") or {}
    recorded = [training.get("adopted_from"), training.get("base_model"), proof.get("base_model")]
    names = {path: Path(path).name for path in recorded if path} | {base.path: base.name}
    absolute = {path: name for path, name in names.items() if Path(path).is_absolute()}
    # The longest first: one can be the beginning of another.
    ordered = sorted(absolute.items(), key=lambda pair: -len(pair[0]))
    return {**dict(ordered), f"results/{point.resolve().parent.name}/{point.resolve().name}/": ""}


def _replace(text: str, replaced: Mapping[str, str]) -> str:
    for old, new in replaced.items():
        for spell in (str, lambda part: json.dumps(part)[1:-1]):
            text = text.replace(spell(old), spell(new))
    return text
