"""Models and data on the Hugging Face hub: how the experiment refers to them, and where they are downloaded to.

    hf://org/name[@revision]                    a model
    org/name[@revision]                         the same, if there is no such path in the working directory
    hf://datasets/org/name[@revision]/FILE      a file of a data set: .jsonl, .json, .csv or .parquet

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
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.experiment.sections import DATA_KEYS, DATA_REFERENCE, MODEL_NAME, MODEL_REFERENCE, Experiment
from lorasweep.util.errors import InputError
from lorasweep.util.files import read_record, write_record
from lorasweep.util.formats import format_bytes

DOWNLOADS = Path("downloads")
"""Folder of downloads in the working directory, shared by all its experiments."""

TASK_DATA = DOWNLOADS / "tasks"
"""Folder of the caches of what tasks load from the hub. If it exists, scripts/run has evaluations use them."""

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
        return DOWNLOADS / "datasets" / name / self.file

    def __str__(self) -> str:
        if self.file is None:
            return f"hf://{self.repository}@{self.revision}"
        return f"hf://datasets/{self.repository}@{self.revision}/{self.file}"


def read_reference(text: str) -> Reference | None:
    """Return the reference that a value with `hf://` is, or `None` for any other value."""
    match = re.fullmatch(DATA_REFERENCE, text) or re.fullmatch(MODEL_REFERENCE, text)
    return _make_reference(match) if match else None


def read_model_name(text: str) -> Reference | None:
    """Return the reference that the value of a model is without `hf://`, or `None`: a local path has precedence."""
    match = re.fullmatch(MODEL_NAME, text)
    return _make_reference(match) if match and not Path(text).exists() else None


def _make_reference(match: re.Match[str]) -> Reference:
    parts = match.groupdict()
    return Reference(parts["repository"], parts["revision"] or "main", parts.get("file"))


def find_references(experiment: Experiment) -> dict[str, Reference]:
    """Return the experiment's references to the hub, by key."""
    models, files = _get_models(experiment), {}

    def note(key: str, value: str) -> str:
        files[key] = value
        return value

    _change_data(experiment, note)
    found = {key: read_reference(value) for key, value in {**models, **files}.items()}
    found |= {key: read_model_name(value) for key, value in models.items() if not found[key]}
    return {key: reference for key, reference in found.items() if reference}


def _get_models(experiment: Experiment) -> dict[str, str]:
    """Return the values that name models, by key."""
    evaluation = experiment.evaluation
    return {
        **({"model.path": experiment.model.path} if experiment.model.path else {}),
        **{f"models.{name}.path": model.path for name, model in experiment.models.items()},
        **({"evaluation.base_model": evaluation.base_model} if evaluation.base_model else {}),
        **{f"evaluation.baselines.{i}.model": baseline.model for i, baseline in enumerate(evaluation.baselines)},
    }


def _change_data(experiment: Experiment, change: Callable[[str, str], str]) -> dict[str, Any]:
    """Return the sections that name files of data, by key, with each file changed.

    `change` gets the file's key in the experiment, and the file.
    """

    def change_files(where: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(
                change_files(f"{where}.{index}" if len(value) > 1 else where, v) for index, v in enumerate(value)
            )
        return change(where, value) if isinstance(value, str) else value

    def change_section(where: str, section: Mapping[str, Any]) -> dict[str, Any]:
        return {key: change_files(f"{where}.{key}", section[key]) for key in DATA_KEYS if key in section}

    def change_choices(where: str, values: list[Any]) -> list[Any]:
        return [change_files(f"{where}.{index}", value) for index, value in enumerate(values)]

    data, variables, sample = experiment.data, experiment.variables, experiment.sample
    sets = {
        name: part.model_copy(update=change_section(f"data.sets.{name}", part.given))
        for name, part in data.sets.items()
    }
    changed = {
        "data": data.model_copy(update={**change_section("data", dict(data)), "sets": sets}),
        "variables": {
            key: change_choices(f"variables.{key}", values) if key in DATA_KEYS else values
            for key, values in variables.items()
        },
        "exclude": [
            {**entry, **change_section(f"exclude.{index}", entry)}
            if isinstance(entry, dict)
            else _change_condition(entry, partial(change, f"exclude.{index}"))
            for index, entry in enumerate(experiment.exclude)
        ],
        "runs": [{**run, **change_section(f"runs.{index}", run)} for index, run in enumerate(experiment.runs)],
    }
    if sample and (drawn := sample.space.keys() & {*DATA_KEYS}):
        space = {
            key: part.model_copy(update={"choices": change_choices(f"sample.space.{key}", part.choices)})
            for key, part in sample.space.items()
            if key in drawn and part.choices
        }
        changed["sample"] = sample.model_copy(update={"space": sample.space | space})
    return changed


def _change_condition(text: str, change: Callable[[str], str]) -> str:
    """Return a condition with each file on the hub that it names changed."""
    return re.sub(r"hf://datasets/[^'\"\s]+", lambda found: change(found[0]), text)


def read_revisions(record: Path) -> dict[str, str]:
    """Return the recorded commits of an experiment's references, by `Reference.key`.

    Raises:
        InputError: The file is not a record written by lorasweep.
    """
    return read_record(record, str)


def check_fetched(experiment: Experiment, revisions: Mapping[str, str], source: str) -> None:
    """Check that all hub references of an experiment are downloaded; `source` is the experiment file.

    A base model without `hf://` is left to `find_missing_model`, since it may also be a path that does not exist yet.

    Raises:
        InputError: A reference is not downloaded, or its download was deleted.
    """
    models = _get_models(experiment)
    for key, reference in find_references(experiment).items():
        if _is_fetched(pin(reference, revisions)):
            continue
        if read_reference(models.get(key, str(reference))):
            raise InputError(f"{key}: {reference} is not downloaded; run: lorasweep download {source}")
        if key.startswith("evaluation.baselines") and experiment.evaluation.enabled:
            raise InputError(f"{key}: {explain_absence(models[key], source)}")


def explain_absence(model: str, source: str) -> str:
    """Return a message about a model that is not there; `source` is the experiment file."""
    if read_model_name(model):
        return f"no such directory: {model!r}. If this model on the hub is meant, run: lorasweep download {source}"
    expected = "a local Hugging Face checkpoint directory, or hf://org/name on the hub"
    return str(InputError(f"no such directory: {model!r}", expected))


def with_local_paths(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return the experiment with references replaced by local paths of their downloads.

    A model without `hf://` that is not downloaded stays as it is.
    """

    def find(value: str, reference: Reference) -> str:
        pinned = pin(reference, revisions)
        return str(pinned.path) if read_reference(value) or _is_fetched(pinned) else value

    return _replace(experiment, find)


def with_commits(experiment: Experiment, revisions: Mapping[str, str]) -> Experiment:
    """Return the experiment with references pinned to commits, so that a rerun uses the same files.

    A model without `hf://` whose commit is not recorded stays as it is.
    """

    def find(value: str, reference: Reference) -> str:
        pinned = pin(reference, revisions)
        return str(pinned) if read_reference(value) or pinned.is_pinned else value

    return _replace(experiment, find)


def pin(reference: Reference, revisions: Mapping[str, str]) -> Reference:
    """Return the reference pinned to its recorded commit; unchanged if no commit is recorded."""
    return replace(reference, revision=revisions.get(reference.key, reference.revision))


def _is_fetched(pinned: Reference) -> bool:
    return pinned.is_pinned and pinned.path.exists()


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


def upload(reference: Reference, folder: Path, key: str, *, is_private: bool) -> str:
    """Commit the files of a folder to a model repository without files, and return the commit.

    `key` names the reference in messages. All files are there, or none is.

    Raises:
        InputError: There is no token, it may not write there, the repository has files, or the upload failed.
    """
    options = ["--folder", str(folder), *(["--private"] if is_private else [])]
    return str(_ask("upload", reference, key, *options)["commit"])


def describe_missing(references: Mapping[str, Reference], record: Path) -> str:
    """Return a description of what a run would download first, or "". Downloads and writes nothing.

    Raises:
        InputError: As for `fetch`.
    """
    revisions = read_revisions(record)
    lines = {}
    for key, reference in references.items():
        pinned = pin(reference, revisions)
        if _is_fetched(pinned):
            continue
        info = _ask("look", pinned, key)
        pinned = replace(reference, revision=info["commit"])
        size = sum(info["files"].values())
        lines[str(reference)] = f"  {reference}: {len(info['files'])} files, {format_bytes(size)}, to {pinned.path}"
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


def _ask(what: str, reference: Reference, key: str, *options: str) -> Any:
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
        command: Sequence[str] = [sys.executable, "-m", "lorasweep", "job", "ask_hub", what, str(reference), *options]
        process = subprocess.run(
            command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=environment, check=False
        )
    try:
        output = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        output = {"error": f"it ended with the exit code {process.returncode}; run the same command again"}
    if "error" in output:
        raise InputError(f"{key}: {reference}: {output['error']}")
    return output


def _replace(experiment: Experiment, find: Callable[[str, Reference], str]) -> Experiment:
    def change(value: str | None) -> str | None:
        reference = read_reference(value) if value else None
        return find(str(value), reference) if reference else value

    def change_model(value: str | None) -> str | None:
        reference = read_model_name(value) if value else None
        return find(str(value), reference) if reference else change(value)

    model, evaluation = experiment.model, experiment.evaluation
    return experiment.model_copy(
        update={
            "model": model.model_copy(update={"path": change_model(model.path)}),
            "models": {
                name: named.model_copy(update={"path": change_model(named.path)})
                for name, named in experiment.models.items()
            },
            **_change_data(experiment, lambda _, file: str(change(file))),
            "evaluation": evaluation.model_copy(
                update={
                    "base_model": change_model(evaluation.base_model),
                    "baselines": [b.model_copy(update={"model": change_model(b.model)}) for b in evaluation.baselines],
                    "tasks": [
                        task.model_copy(update={"when": _change_condition(task.when, lambda file: str(change(file)))})
                        if task.when
                        else task
                        for task in evaluation.tasks
                    ],
                }
            ),
        }
    )
