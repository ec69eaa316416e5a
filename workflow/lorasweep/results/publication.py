"""What others need to use and check a point: its weights, a model card, its logs, `reproduce.py` and its manifest.

The adapter of a point, or its full model in mode A, is at the top, where PEFT, transformers and vLLM look for it.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.layout import ADAPTER_CONFIG, CARD, MANIFEST, METRICS, RECORD, REPRODUCTION
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import write_record

_OF_RECORD = ("base_model", "adopted_from")
_OF_METRICS = ("proof.base_model", "spec.base_model")
_PATHS = (
    *(*_OF_RECORD, *_OF_METRICS),
    # A manifest has both records.
    *("settings.adapter", *(f"training.{key}" for key in _OF_RECORD), *(f"evaluation.{key}" for key in _OF_METRICS)),
)
"""Where a point's records have paths of models and adapters."""

_ABSOLUTE = re.compile(r"(?:\w+/)?/[^/\n]+/[^\n]+")
"""An absolute path, or the name of one of Inspect's providers with one."""

_SPEC = "SPEC = "
"""With what the specification begins in the page of an evaluation."""


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
        InputError: the folder is no point, or a baseline, or published already, or its point is not finished.
    """
    file = point / MANIFEST
    if not file.is_file():
        raise InputError(f"{point}: no finished point: it has no {MANIFEST}", "results/<experiment>/<point>")
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if any("/" not in entry["path"] and entry["path"] != "recipe.yaml" for entry in manifest["files"]):
        expected = "the point's own folder, results/<experiment>/<point>; hf upload takes this one to the hub as it is"
        raise InputError(f"{point}: is published already: its weights are at the top", expected)
    if manifest["mode"] == "base":
        raise InputError(f"{point}: a baseline has no weights of its own", "a point with an adapter")
    return manifest


def gather(
    point: Path, manifest: Mapping[str, Any], folder: Path, base: Base, *, has_logs: bool, links: bool
) -> list[str]:
    """Put the files of a point into an empty folder, with a manifest of them, but without its card.

    In the point's own records, an absolute path of a base model becomes its name, and that of an adopted adapter the
    name of its folder. Weights, tokenizer and logs are byte for byte those of the manifest. Return the other absolute
    paths in the records, such as a judge's: the evaluation is known by what it was told, so they stay.

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
    evaluated_on = (manifest["evaluation"].get("proof") or {}).get("base_model", "")
    changed: dict[str, Callable[[str], str]] = {
        ADAPTER_CONFIG: lambda text: _name_base(text, base),
        REPRODUCTION: lambda text: _name_paths_of_page(text, point, evaluated_on, base),
        **dict.fromkeys((RECORD, METRICS), lambda text: _dump(_name_paths(json.loads(text), base))),
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
    published = _name_paths(json.loads(json.dumps(manifest)), base) | {"files": entries}
    write_record(folder / MANIFEST, published, sorts=False)
    return sorted({text for text in _list_texts(published) if _ABSOLUTE.fullmatch(text)})


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


def _name_paths(record: dict[str, Any], base: Base) -> dict[str, Any]:
    """Put names in place of the absolute paths of models and adapters in a record that was read from a file."""
    for place in _PATHS:
        *sections, key = place.split(".")
        part: Any = record
        for section in sections:
            part = part.get(section) or {}
        if isinstance(part.get(key), str):
            part[key] = _name(part[key], base)
    return record


def _name(path: str, base: Base) -> str:
    if not Path(path).is_absolute():
        return path
    return base.name if path == base.path else Path(path).name


def _name_paths_of_page(text: str, point: Path, base_model: str, base: Base) -> str:
    """Put names in place of the paths of the base model and of the point in the page of an evaluation."""
    name = _name(base_model, base)
    head, begin, rest = text.partition(_SPEC)
    head = head.replace(f"results/{point.resolve().parent.name}/{point.resolve().name}/", "")
    head = head.replace(f"# base:     {base_model}\n", f"# base:     {name}\n")
    # The first is the specification's own, before the arguments of tasks and judges.
    return head + begin + rest.replace(f"'base_model': {base_model!r}", f"'base_model': {name!r}", 1)


def _dump(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _list_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _list_texts(part)
