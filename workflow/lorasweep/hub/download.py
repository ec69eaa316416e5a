"""Fetching from the Hugging Face hub: whole or not at all, by one process at a time, and only what is read.

What is fetched lies in `downloads/.partial/` until it is whole; there an attempt that was interrupted is gone on with.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.checkpoint import GENERATION_CONFIG, INDEX, SINGLE, TOKENIZER_FILES, read_checkpoint
from lorasweep.hub.references import DOWNLOADS, TOKEN, Reference
from lorasweep.util.errors import InputError
from lorasweep.util.files import hold_alone

_SHARD = r"model-\d+(-of-\d+)?\.safetensors"
_CONNECTIONS = 4
_HINT = f"export {TOKEN} with a token that may read it, where Snakemake is called"


def look(reference: Reference) -> dict[str, Any]:
    """Return the `commit` of a reference, and the bytes of its `files` by name.

    Raises:
        InputError: it is not there, or not for this token, or holds nothing that can be used.
    """
    from huggingface_hub import HfApi

    ask = HfApi().dataset_info if reference.file else HfApi().model_info
    try:
        info: Any = ask(reference.repository, revision=reference.revision, files_metadata=True, token=_get_token())
    except Exception as error:
        raise InputError(_explain(error, reference)) from None
    if info.gated and not _get_token():
        raise InputError(_explain_gate())
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return {"commit": str(info.sha), "files": {name: sizes[name] for name in _choose(reference, sizes)}}


def fetch(reference: Reference) -> None:
    """Fetch a reference that names a commit to where it is read, unless it is there; another process is waited for.

    Raises:
        InputError: as `look`, or what was fetched is no checkpoint or no data.
    """
    target = reference.path
    name = str(target.relative_to(DOWNLOADS)).replace("/", "--")
    with hold_alone(DOWNLOADS / ".locks" / name, f"fetching {reference}"):
        if target.exists():
            return
        partial = DOWNLOADS / ".partial" / name
        files = look(reference)["files"]
        print(f"Fetching {reference}: {len(files)} files, {sum(files.values()) / 1e6:,.1f} MB", flush=True)
        _fetch_files(reference, files, partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        if reference.file is None:
            read_checkpoint(partial)
            shutil.rmtree(partial / ".cache", ignore_errors=True)
            partial.rename(target)
            return
        whole = partial / reference.file
        if whole.suffix == ".parquet":
            whole = _write_lines(whole)
        whole.rename(target)
        shutil.rmtree(partial)


def _choose(reference: Reference, names: Collection[str]) -> list[str]:
    """The files of a repository that are read."""
    if reference.file is not None:
        if reference.file not in names:
            alike = sorted(name for name in names if re.search(r"\.(jsonl|json|parquet)$", name))
            raise InputError("no such file", ", ".join(alike[:10]) or "none: it has no .jsonl, .json, .parquet")
        return [reference.file]
    weights = [SINGLE] if SINGLE in names else sorted(name for name in names if re.fullmatch(_SHARD, name))
    if "config.json" not in names or not weights:
        raise InputError(f"it has no {SINGLE} or shards of it beside a config.json", "a model in safetensors")
    index = [INDEX] if weights != [SINGLE] else []
    wanted = ["config.json", GENERATION_CONFIG, *TOKENIZER_FILES, *index]
    return [*(name for name in wanted if name in names), *weights]


def _fetch_files(reference: Reference, files: Collection[str], folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    def fetch_one(name: str) -> None:
        hf_hub_download(
            reference.repository,
            name,
            repo_type=reference.kind,
            revision=reference.revision,
            local_dir=folder,
            token=_get_token(),
        )

    try:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(fetch_one, files))
    except Exception as error:
        raise InputError(_explain(error, reference)) from None


def _write_lines(file: Path) -> Path:
    """Write the rows of a Parquet file as JSON lines."""
    from pyarrow.parquet import ParquetFile

    lines = file.with_suffix(".jsonl")
    with lines.open("w", encoding="utf-8") as stream:
        for batch in ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                stream.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    return lines


def _get_token() -> str | bool:
    """The environment's token, or that there is none: one that lies in the home is not looked for."""
    return os.environ.get(TOKEN) or False


def _explain_token() -> str:
    return f"the token in {TOKEN} may not read it" if os.environ.get(TOKEN) else f"{TOKEN} is not set"


def _explain_gate() -> str:
    return f"it is gated, and {_explain_token()}; accept its terms on the hub, and {_HINT}"


def _explain(error: Exception, reference: Reference) -> str:
    """Say why the hub did not give something, without the token."""
    from huggingface_hub import errors

    token, state = os.environ.get(TOKEN), _explain_token()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return _explain_gate()
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = f"no such {reference.kind} on the hub, or a private one ({state})"
        return str(InputError(problem, f"org/name as there; {_HINT}"))
    if isinstance(error, errors.RevisionNotFoundError):
        return str(InputError(f"no such revision '{reference.revision}'", "a branch, a tag or a commit of it"))
    if status in (401, 403):
        return f"the hub refuses it with {status}, and {state}; {_HINT}"
    said = str(error).strip().splitlines() or [type(error).__name__]
    text = (
        f"it could not be fetched ({type(error).__name__}: {said[0]}); the same command goes on with it. From a node "
        "without a way to the hub nothing can be fetched: run 'lorasweep download' on one that has it"
    )
    return text.replace(token, "***") if token else text
