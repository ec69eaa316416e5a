"""Put together what others need to use and check a point: in a folder, or on the Hugging Face hub in one commit.

That is its adapter (of a point in mode A, the full model), a model card, its logs, `reproduce.py` and its manifest. The
hub's token is read from `HF_TOKEN`. A failed upload leaves no file, and a failed copy no folder.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorasweep.evaluation.spec import VLLM_RANKS
from lorasweep.hub import references as hub
from lorasweep.hub.access import check_token
from lorasweep.layout import CARD, EXPERIMENT
from lorasweep.results.card import make_card
from lorasweep.results.publication import Base, gather, read_manifest
from lorasweep.sweep.sweep import RESULTS
from lorasweep.util.errors import InputError

_HUB = "hf://"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("point", type=Path, help="the point's folder of results, or EXPERIMENT/POINT")
    parser.add_argument(
        "--to", required=True, metavar="PLACE", help="hf://org/name, a new repository; or a new folder on this machine"
    )
    parser.add_argument("--private", action="store_true", help="make a repository that only its owners see")
    parser.add_argument("--no-logs", action="store_true", help="leave out Inspect's logs, which contain the samples")
    parser.add_argument(
        "--base-model",
        metavar="NAME",
        help="the base model's name on the hub, as org/name or org/name@revision (default: where it was downloaded "
        "from, else the name of its folder)",
    )


def run(arguments: argparse.Namespace) -> None:
    point = (arguments.point if arguments.point.is_dir() else RESULTS / arguments.point).resolve()
    reference = _read_target(arguments.to)
    target = Path(arguments.to).resolve()
    if reference:
        check_token()
    if reference is None and arguments.private:
        raise InputError("--private is for a repository, but --to is a folder", "--to hf://org/name")
    if reference is None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"--to: {arguments.to} exists, and is not an empty folder", "a new folder, or hf://org/name")
    manifest = read_manifest(point)
    base = _find_base(point, manifest, arguments.base_model)
    name = reference.repository if reference else target.name
    card = make_card(point, manifest, name, base, VLLM_RANKS)
    settings: dict[str, Any] = {"has_logs": not arguments.no_logs, "links": reference is not None}
    if reference:
        with tempfile.TemporaryDirectory(prefix="lorasweep-") as folder:
            paths = gather(point, manifest, Path(folder), base, **settings)
            Path(folder, CARD).write_text(card, encoding="utf-8")
            commit = hub.upload(reference, Path(folder), "--to", is_private=arguments.private)
        _tell(point, f"hf://{reference.repository}@{commit}", paths)
        return
    aside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        paths = gather(point, manifest, aside, base, **settings)
        (aside / CARD).write_text(card, encoding="utf-8")
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _tell(point, str(target), paths)


def _tell(point: Path, place: str, paths: Sequence[str]) -> None:
    print(f"Published {point}: {place}")
    if paths:
        print(f"Its records name paths of this machine, which stay as they are: {', '.join(paths)}")


def _read_target(text: str) -> hub.Reference | None:
    """Return the repository to publish to; `None` if it is a folder."""
    if not text.startswith(_HUB):
        return None
    reference = hub.read_reference(text)
    if reference is None or reference.file or "@" in text:
        raise InputError(f"--to: {text!r} is invalid", "hf://org/name, or a folder")
    return reference


def _find_base(point: Path, manifest: dict[str, Any], name: str | None) -> Base:
    """Return the base model of a point: as `name` says, as its experiment does, or by its folder.

    Raises:
        InputError: `name` is no name on the hub.
    """
    proof = manifest["evaluation"].get("proof") or {}
    recorded = [manifest["training"].get("base_model"), proof.get("base_model")]
    # An adopted adapter's record names the base model where it was trained.
    is_adopted = "adopted_from" in manifest["training"]
    path = next(filter(None, reversed(recorded) if is_adopted else recorded), "")
    if name:
        reference = hub.read_reference(name if name.startswith(_HUB) else f"{_HUB}{name}")
        if reference is None or reference.file:
            raise InputError(f"--base-model: {name!r} is invalid", "org/name or org/name@revision, as on the hub")
        return Base(reference.repository, reference.revision if "@" in name else None, True, path)
    file = point.parent / EXPERIMENT
    experiment = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for value in _list_texts(experiment):
        reference = hub.read_reference(value)
        if reference and reference.is_pinned and not reference.file and reference.path.name == Path(path).name:
            return Base(reference.repository, reference.revision, True, path)
    if not path:
        raise InputError(f"{point}: its records do not name its base model", "its name, by --base-model")
    return Base(Path(path).name, None, False, path)


def _list_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _list_texts(part)
