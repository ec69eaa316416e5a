"""Models and data on the Hugging Face hub: how the experiment refers to them, and where they are downloaded to.

    hf://org/name[@revision]                    a model
    hf://datasets/org/name[@revision]/FILE      a file of a data set: .jsonl, .json or .parquet

The process that plans and submits downloads them into `downloads/` first, because the plan depends on the base model's
headers. After that they are local paths, and jobs do not access the hub. The experiment's `revisions.json` keeps the
commit of each branch or tag at the first download, so that a moved branch does not change a sweep.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasweep.experiment.sections import DATA_REFERENCE, MODEL_REFERENCE, Experiment
from lorasweep.util.errors import InputError
from lorasweep.util.files import read_record, write_record

DOWNLOADS = Path("downloads")
"""Folder of downloads in the working directory, shared by all its experiments."""

TOKEN = "HF_TOKEN"
"""The environment variable of the token. It is read only by the process that accesses the hub."""

_COMMIT = r"[0-9a-f]{40}"
_DIGITS = 12


@dataclass(frozen=True)
class Reference:
    """A model or a file of a data set on the hub."""

    repository: str
    revision: str
    file: str | None = None
    """The file of a data set; `None` for a model, which is downloaded as a whole."""

    @property
    def kind(self) -> str:
        """The hub's term for the type of the repository: `model` or `dataset`."""
        return "dataset" if self.file else "model"

    @property
    def key(self) -> str:
        """Key of the reference in `revisions.json`; files of one data set share it."""
        return f"{self.kind}s/{self.repository}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        return bool(re.fullmatch(_COMMIT, self.revision))

    @property
    def path(self) -> Path:
        """Local path of the download. The reference must be pinned to a commit."""
        name = f"{self.repository.replace('/', '--')}@{self.revision[:_DIGITS]}"
        if self.file is None:
            return DOWNLOADS / name
        return DOWNLOADS / "datasets" / name / re.sub(r"\.parquet$", ".parquet.jsonl", self.file)

    def __str__(self) -> str:
        if self.file is None:
            return f"hf://{self.repository}@{self.revision}"
        return f"hf://datasets/{self.repository}@{self.revision}/{self.file}"


def read_reference(text: str) -> Reference | None:
    """Return the hub reference of a value in the experiment file, or `None` for a local path."""
    match = re.fullmatch(DATA_REFERENCE, text) or re.fullmatch(MODEL_REFERENCE, text)
    if not match:
        return None
    parts = match.groupdict()
    return Reference(parts["repository"], parts["revision"] or "main", parts.get("file"))


def find_references(experiment: Experiment) -> dict[str, Reference]:
    """Return the experiment's references to the hub, by key."""
    evaluation = experiment.evaluation
    values = {
        "model.path": experiment.model.path,
        "data.train": experiment.data.train,
        "data.validation": experiment.data.validation,
        "evaluation.base_model": evaluation.base_model,
        **{f"evaluation.baselines.{i}.model": baseline.model for i, baseline in enumerate(evaluation.baselines)},
    }
    references = {key: read_reference(value) for key, value in values.items() if value}
    return {key: reference for key, reference in references.items() if reference}


def read_revisions(record: Path) -> dict[str, str]:
    """Return the recorded commits of an experiment's references, by `Reference.key`.

    Raises:
        InputError: The file is not a record written by lorasweep.
    """
    return read_record(record, str)


def check_fetched(experiment: Experiment, revisions: Mapping[str, str], source: str) -> None:
    """Check that all hub references of an experiment are downloaded; `source` is the experiment file.

    Raises:
        InputError: A reference is not downloaded, or its download was deleted.
    """
    for key, reference in find_references(experiment).items():
        pinned = pin(reference, revisions)
        if not (pinned.is_pinned and pinned.path.exists()):
            raise InputError(f"{key}: {reference} is not downloaded; run: lorasweep download {source}")


def with_local_paths(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return the experiment with references replaced by local paths of their downloads."""
    return _replace(experiment, lambda reference: str(pin(reference, revisions).path))


def with_commits(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return the experiment with references pinned to commits, so that a rerun uses the same files."""
    return _replace(experiment, lambda reference: str(pin(reference, revisions)))


def pin(reference: Reference, revisions: Mapping[str, str]) -> Reference:
    """Return the reference pinned to its recorded commit; unchanged if no commit is recorded."""
    return replace(reference, revision=revisions.get(reference.key, reference.revision))


def fetch(references: Mapping[str, Reference], record: Path) -> None:
    """Download the references that are not downloaded yet, and record their commits in the file `record`.

    Raises:
        InputError: A reference does not exist, is not accessible with this token, or the hub cannot be reached.
    """
    revisions = read_revisions(record)
    for key, reference in references.items():
        if not pin(reference, revisions).is_pinned:
            revisions[reference.key] = _ask("look", reference, key)["commit"]
            write_record(record, revisions)
        pinned = pin(reference, revisions)
        if not pinned.path.exists():
            _ask("fetch", pinned, key)


def describe_missing(references: Mapping[str, Reference], record: Path) -> str:
    """Return a description of what a run would download first, or "". Downloads and writes nothing.

    Raises:
        InputError: As for `fetch`.
    """
    revisions = read_revisions(record)
    lines = {}
    for key, reference in references.items():
        pinned = pin(reference, revisions)
        if pinned.is_pinned and pinned.path.exists():
            continue
        info = _ask("look", pinned, key)
        pinned = replace(reference, revision=info["commit"])
        size = sum(info["files"].values())
        lines[str(reference)] = f"  {reference}: {len(info['files'])} files, {size / 1e6:,.1f} MB, to {pinned.path}"
    if not lines:
        return ""
    return "\n".join(
        [
            "To be downloaded from the hub:",
            *lines.values(),
            "The plan is known after the download.",
        ]
    )


def forget_token() -> None:
    """Remove the token from the environment of jobs, unless `HF_HUB_OFFLINE=0` lets jobs access the hub."""
    if os.environ.get("HF_HUB_OFFLINE", "1") != "0":
        os.environ.pop(TOKEN, None)


def _ask(what: str, reference: Reference, key: str) -> Any:
    """Access the hub in a separate process, because its library reads the environment once and writes to the home."""
    with tempfile.TemporaryDirectory(prefix="lorasweep-hub-") as home:
        environment = {
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **os.environ,
            "HF_HOME": home,
            "HF_HUB_OFFLINE": "0",
        }
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        command: Sequence[str] = [sys.executable, "-m", "lorasweep", "job", "ask_hub", what, str(reference)]
        process = subprocess.run(
            command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment, check=False
        )
    try:
        output = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        output = {"error": f"download failed (exit code {process.returncode}); run the same command again to resume it"}
    if "error" in output:
        raise InputError(f"{key}: {reference}: {output['error']}")
    return output


def _replace(experiment: Experiment, find: Callable[[Reference], str]) -> Experiment:
    def change(value: str | None) -> str | None:
        reference = read_reference(value) if value else None
        return find(reference) if reference else value

    model, data, evaluation = experiment.model, experiment.data, experiment.evaluation
    return experiment.model_copy(
        update={
            "model": model.model_copy(update={"path": change(model.path)}),
            "data": data.model_copy(update={key: change(getattr(data, key)) for key in ("train", "validation")}),
            "evaluation": evaluation.model_copy(
                update={
                    "base_model": change(evaluation.base_model),
                    "baselines": [b.model_copy(update={"model": change(b.model)}) for b in evaluation.baselines],
                }
            ),
        }
    )
