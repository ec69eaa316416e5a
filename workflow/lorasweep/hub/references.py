"""Models and data that lie on the Hugging Face hub: how the experiment names them, and where they lie once fetched.

    hf://org/name[@revision]                    a model
    hf://datasets/org/name[@revision]/FILE      a file of a data set: .jsonl, .json or .parquet

They are fetched into `downloads/` by the process that plans and submits, before it looks at anything else of them: the
base model's headers decide what is to do. From there on they are local paths, and jobs ask no hub. What a branch or tag
stood for when an experiment first asked is kept in its `revisions.json`: a branch that moves changes no sweep.
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
"""In the working directory, for all experiments in it."""

TOKEN = "HF_TOKEN"
"""The environment variable that holds a token; it is read where the hub is asked, and nowhere else."""

_COMMIT = r"[0-9a-f]{40}"
_DIGITS = 12


@dataclass(frozen=True)
class Reference:
    """A model, or a file of a data set, on the hub."""

    repository: str
    revision: str
    file: str | None = None
    """Of a data set; a model is fetched as a whole."""

    @property
    def kind(self) -> str:
        """As the hub says it."""
        return "dataset" if self.file else "model"

    @property
    def key(self) -> str:
        """What a commit is kept for; files of one data set share it."""
        return f"{self.kind}s/{self.repository}@{self.revision}"

    @property
    def is_pinned(self) -> bool:
        return bool(re.fullmatch(_COMMIT, self.revision))

    @property
    def path(self) -> Path:
        """Where it lies once it is fetched; it must be pinned."""
        name = f"{self.repository.replace('/', '--')}@{self.revision[:_DIGITS]}"
        if self.file is None:
            return DOWNLOADS / name
        return DOWNLOADS / "datasets" / name / re.sub(r"\.parquet$", ".parquet.jsonl", self.file)

    def __str__(self) -> str:
        if self.file is None:
            return f"hf://{self.repository}@{self.revision}"
        return f"hf://datasets/{self.repository}@{self.revision}/{self.file}"


def read_reference(text: str) -> Reference | None:
    """Return what a value of the experiment file refers to on the hub; nothing where it is a local path."""
    found = re.fullmatch(DATA_REFERENCE, text) or re.fullmatch(MODEL_REFERENCE, text)
    if not found:
        return None
    parts = found.groupdict()
    return Reference(parts["repository"], parts["revision"] or "main", parts.get("file"))


def find_references(experiment: Experiment) -> dict[str, Reference]:
    """Return what an experiment names on the hub, by key."""
    evaluation = experiment.evaluation
    named = {
        "model.path": experiment.model.path,
        "data.train": experiment.data.train,
        "data.validation": experiment.data.validation,
        "evaluation.base_model": evaluation.base_model,
        **{f"evaluation.baselines.{i}.model": baseline.model for i, baseline in enumerate(evaluation.baselines)},
    }
    found = {key: read_reference(value) for key, value in named.items() if value}
    return {key: reference for key, reference in found.items() if reference}


def read_revisions(record: Path) -> dict[str, str]:
    """Return the commits that an experiment has on record.

    Raises:
        InputError: the file is not what lorasweep writes.
    """
    return read_record(record, str)


def check_fetched(experiment: Experiment, revisions: Mapping[str, str], source: str) -> None:
    """Check that all that an experiment names on the hub was fetched.

    Raises:
        InputError: it was not, or is no longer there.
    """
    for key, reference in find_references(experiment).items():
        pinned = pin(reference, revisions)
        if not (pinned.is_pinned and pinned.path.exists()):
            raise InputError(f"{key}: {reference} is not here; fetch it: lorasweep download {source}")


def with_local_paths(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return an experiment with the paths of what was fetched in place of references."""
    return _replace(experiment, lambda reference: str(pin(reference, revisions).path))


def with_commits(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return an experiment whose references name commits: it can be run again and is the same."""
    return _replace(experiment, lambda reference: str(pin(reference, revisions)))


def pin(reference: Reference, revisions: Mapping[str, str]) -> Reference:
    """Return a reference by its commit; as it is, where that is not on record."""
    return replace(reference, revision=revisions.get(reference.key, reference.revision))


def fetch(references: Mapping[str, Reference], record: Path) -> None:
    """Fetch what an experiment names on the hub and is not there yet; write down which commits that is.

    Raises:
        InputError: the hub does not have it, or does not give it to this token, or cannot be reached.
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
    """Say what a run would fetch first; nothing where it would fetch nothing. Nothing is fetched or written for it.

    Raises:
        InputError: as `fetch`.
    """
    revisions = read_revisions(record)
    lines = {}
    for key, reference in references.items():
        pinned = pin(reference, revisions)
        if pinned.is_pinned and pinned.path.exists():
            continue
        found = _ask("look", pinned, key)
        pinned = replace(reference, revision=found["commit"])
        size = sum(found["files"].values())
        lines[str(reference)] = f"  {reference}: {len(found['files'])} files, {size / 1e6:,.1f} MB, to {pinned.path}"
    if not lines:
        return ""
    return "\n".join(
        [
            "To be fetched from the hub:",
            *lines.values(),
            "What is to do is known once it is there.",
        ]
    )


def forget_token() -> None:
    """Take the token out of the environment: no job is to have it, unless jobs are to ask the hub themselves."""
    if os.environ.get("HF_HUB_OFFLINE", "1") != "0":
        os.environ.pop(TOKEN, None)


def _ask(what: str, reference: Reference, key: str) -> Any:
    """Have a process of its own ask the hub: its library reads the environment once, and writes to the home."""
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
        done = subprocess.run(
            command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment, check=False
        )
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = {"error": f"fetching it ended with code {done.returncode}; the same command goes on with it"}
    if "error" in said:
        raise InputError(f"{key}: {reference}: {said['error']}")
    return said


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
