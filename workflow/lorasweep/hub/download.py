"""Download from the Hugging Face hub: atomically, by one process at a time, and only the files that are used.

A download stays in `downloads/.partial/` until it is complete. An interrupted download is resumed from there.
"""

import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.checkpoint import (
    CODE,
    COMPANIONS,
    INDEX,
    SINGLE,
    TOKENIZER_FILES,
    choose_files,
    read_checkpoint,
)
from lorasweep.hub.access import explain, explain_gate, get_token
from lorasweep.hub.references import DOWNLOADS, Reference
from lorasweep.layout import CARD
from lorasweep.util.errors import InputError
from lorasweep.util.files import hold_alone
from lorasweep.util.formats import format_bytes

_SHARD = r"model-\d+(-of-\d+)?\.safetensors"
_CONNECTIONS = 4
_FAILED = (
    "the download failed ({}); run the same command again to resume it. If this node has no access to the hub, run "
    "'lorasweep download' on one that has access"
)


def look(reference: Reference) -> dict[str, Any]:
    """Return the `commit` of a reference, and the sizes of its `files` in bytes, by name.

    Raises:
        InputError: The reference does not exist, is not accessible with this token, or has no usable files.
    """
    from huggingface_hub import HfApi

    get_info = HfApi().dataset_info if reference.file else HfApi().model_info
    try:
        info: Any = get_info(reference.repository, revision=reference.revision, files_metadata=True, token=get_token())
    except Exception as error:
        raise InputError(explain(error, reference, _FAILED)) from None
    if info.gated and not get_token():
        raise InputError(explain_gate())
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return {"commit": str(info.sha), "files": {name: sizes[name] for name in _choose(reference, sizes)}}


def fetch(reference: Reference) -> None:
    """Download a pinned reference to its `path`, unless it exists. Waits for another process that downloads it.

    Raises:
        InputError: `look` fails, or the download is not a checkpoint or not data.
    """
    target = reference.path
    name = str(target.relative_to(DOWNLOADS)).replace("/", "--")
    with hold_alone(DOWNLOADS / ".locks" / name, f"downloading {reference}"):
        if target.exists():
            return
        partial = DOWNLOADS / ".partial" / name
        files = look(reference)["files"]
        print(f"Downloading {reference}: {len(files)} files, {format_bytes(sum(files.values()))}", flush=True)
        _fetch_files(reference, files, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        if reference.file is None:
            read_checkpoint(partial)
            shutil.rmtree(partial / ".cache", ignore_errors=True)
            partial.rename(target)
            return
        (partial / reference.file).rename(target)
        shutil.rmtree(partial)


def _choose(reference: Reference, names: Collection[str]) -> list[str]:
    """Return the files of a repository to download."""
    if reference.file is not None:
        if reference.file not in names:
            candidates = sorted(name for name in names if re.search(r"\.(jsonl|json|csv|parquet)$", name))
            expected = "a data set with .jsonl, .json, .csv or .parquet"
            raise InputError("no such file", ", ".join(candidates[:10]) or expected)
        return [reference.file]
    weights = [SINGLE] if SINGLE in names else sorted(name for name in names if re.fullmatch(_SHARD, name))
    if "config.json" not in names or not weights:
        raise InputError(f"it has no config.json with {SINGLE} or its shards", "a model in safetensors")
    index = [INDEX] if weights != [SINGLE] else []
    wanted = ("config.json", CARD, "LICENSE*", *COMPANIONS, *TOKENIZER_FILES, *CODE, *index)
    return [*choose_files(names, wanted), *weights]


def _fetch_files(reference: Reference, files: Collection[str], folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    def fetch_one(name: str) -> None:
        hf_hub_download(
            reference.repository,
            name,
            repo_type=reference.kind,
            revision=reference.revision,
            local_dir=folder,
            token=get_token(),
        )

    try:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(fetch_one, files))
    except Exception as error:
        raise InputError(explain(error, reference, _FAILED)) from None
