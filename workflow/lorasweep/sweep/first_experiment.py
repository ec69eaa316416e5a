"""The first experiment of a person: what a model, a file of samples and a task need, and the file that says so."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lorasweep.checkpoints.architecture import get_architecture, has_environment
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.lora import find_modules
from lorasweep.checkpoints.shapes import read_shape
from lorasweep.experiment.loading import parse_section
from lorasweep.experiment.sections import DEFAULT_TRAINER, NAME_PATTERN, Controls, Data, Model, Task
from lorasweep.experiment.tasks import get_tasks
from lorasweep.experiment.training_data import FILES, check_data, read_first_row
from lorasweep.hub.references import read_model_name, read_reference
from lorasweep.sweep.checks import has_weights
from lorasweep.trainers.torchtune.models import get_model
from lorasweep.util.errors import InputError

PAIRS = (
    *(("input", "output"), ("prompt", "completion"), ("question", "answer"), ("prompt", "response")),
    *(("instruction", "response"), ("query", "response"), ("question", "response"), ("source", "target")),
)
"""Names of the columns of a question and its answer, the likeliest first."""

RANKS = (8, 16, 32)

_ALL = Controls(lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True)
"""Adapters for all linear layers but the head, in torchtune's words."""

_COMMENT = 40
"""Column at which comments begin, if they can."""

_LARGEST_BATCH = 8


class UnclearColumnsError(InputError):
    """It is not clear which columns of a file are the question and the answer. `columns` are those with text."""

    def __init__(self, columns: Sequence[str], file: str) -> None:
        self.columns = columns
        super().__init__(
            f"the columns of text are {', '.join(columns) or 'none'}; which are the question and the answer is unclear",
            f"--columns QUESTION ANSWER; or a file with the columns {', '.join(map(' and '.join, PAIRS[:3]))}, "
            "instruction and output, messages, conversations, or text",
            file=file,
        )


@dataclass(frozen=True)
class FoundModel:
    """A base model, and how it can be trained."""

    path: str
    trainer: str
    modules: str | list[str] | None
    """The value of `controls.lora_modules`; `None`: torchtune's words."""
    notes: Sequence[str]
    """Sentences for the person."""


@dataclass(frozen=True)
class FoundData:
    """A file of training samples, and how it is read."""

    file: str
    keys: Mapping[str, str]
    """`format`, and the keys of its columns, of the section `data`."""
    samples: int | None
    """Number of samples; `None`: not known."""
    notes: Sequence[str]


def find_model(path: str) -> FoundModel:
    """Find out which trainer trains a model, and which of its layers get adapters.

    Raises:
        InputError: There is no such checkpoint, or it is broken.
    """
    path = os.path.expanduser(path).rstrip("/") or "/"
    parse_section(Model, {"path": path})
    if reference := read_reference(path) or read_model_name(path):
        note = f"{path}: no such directory here, so {reference} on the hub is meant; nothing of it is known yet."
        return FoundModel(path, "trl", "all-linear", [note])
    if not Path(path, "config.json").is_file():
        problem = "has no config.json" if Path(path).is_dir() else "no such directory"
        raise InputError(f"{path}: {problem}", "a Hugging Face checkpoint directory, or org/name of a model on the hub")
    notes = []
    if not has_weights(Path(path)):
        notes.append(f"{path}: has no weights, which is enough for a plan, not for a run.")
        if not has_environment():  # which is needed to derive the layers
            return FoundModel(path, "trl", "all-linear", notes)
        checkpoint = read_shape(Path(path))
    else:
        checkpoint = read_checkpoint(Path(path))
    if not checkpoint.has_chat_template:
        notes.append(
            f"{path}: has no chat template: a prompt is 'user: ' with the text and a line break, unless "
            "model.chat_template names one."
        )
    try:
        get_model(checkpoint, _ALL)
    except InputError as error:
        modules = _choose_modules(checkpoint)
        reason = str(error).split(". It trains ")[0].partition("cannot be trained by torchtune: ")[2]
        notes.append(f"{path}: trainer: trl, as torchtune cannot train it{f' ({reason})' if reason else ''}.")
        return FoundModel(path, "trl", modules, notes)
    return FoundModel(path, DEFAULT_TRAINER, None, [*notes, f"{path}: trainer: torchtune, which knows such models."])


def find_data(file: str, columns: Sequence[str] = ()) -> FoundData:
    """Find the format and the columns of a file of samples, and check every sample; of one on the hub, guess.

    `columns`: the columns of the question and of the answer, if they are known.

    Raises:
        UnclearColumnsError: No format fits its columns.
        InputError: There is no such file, or it or one of its samples is invalid.
    """
    file = os.path.expanduser(file)
    named = dict(zip(("input_column", "output_column"), columns, strict=False))
    parse_section(Data, {"train": file, **named})
    if read_reference(file):
        keys = {"format": "instruct", "input_column": "input", "output_column": "output", **named}
        return FoundData(file, keys, None, [f"{file}: is not read yet; its format and columns below are a guess."])
    if not Path(file).is_file():
        raise InputError(f"{file}: no such file", f"a file of {FILES}; or hf://datasets/org/name/FILE on the hub")
    keys = {"format": "instruct", **named} if named else _choose_format(read_first_row(file), file)
    samples = check_data(parse_section(Data, {"train": file, **keys})).samples
    shown = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return FoundData(file, keys, samples, [f"{file}: {samples} samples; {shown}."])


def find_task(task: str) -> str:
    """Check a task, `file.py@task` or a registered name, as far as it can be without Inspect; return it.

    Raises:
        InputError: There is no such file, it does not define the task, or the task needs arguments.
    """
    try:
        entry = get_tasks([Task(task=task)])[0]
    except InputError as error:
        error.problems = [problem.removeprefix("evaluation.tasks.0: ") for problem in error.problems]
        raise
    return f"{entry.file}@{entry.name}" if entry.file and "@" not in task else task


def find_device() -> Literal["cuda", "cpu"]:
    """Return where jobs can run on this machine."""
    return "cuda" if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") else "cpu"


def make_name(file: Path) -> str:
    """Return a name for the experiment in a file."""
    name = re.sub(r"[^A-Za-z0-9_+=-]+", "_", file.stem).strip("_=+-")
    return name if re.fullmatch(NAME_PATTERN, name) else "experiment"


def describe_experiment(
    name: str, model: FoundModel, data: FoundData, tasks: Sequence[str], device: Literal["cuda", "cpu"]
) -> str:
    """Return the text of an experiment's file: YAML, each key with a comment."""
    if model.modules is None:
        modules = [
            ("  lora_attn_modules", _ALL.lora_attn_modules, "attention projections that get an adapter"),
            ("  apply_lora_to_mlp", True, "whether the three projections of each MLP get one too"),
        ]
    else:
        every = "all linear layers but the head" if model.modules == "all-linear" else "layers, by the model's names"
        modules = [("  lora_modules", model.modules, f"what gets an adapter: {every}")]
    trainer = "or trl, for any model" if model.trainer == DEFAULT_TRAINER else "for any model that transformers loads"
    batch = min(_LARGEST_BATCH, data.samples or _LARGEST_BATCH)
    lines: list[tuple[str, Any, str] | str] = [
        "# Written by `lorasweep new`. Every key that there is: config/README.md.",
        "",
        ("experiment", None, ""),
        ("  name", name, f"its results are in results/{name}"),
        ("  question", "Which rank is enough?", "what the sweep should answer; shown in the report"),
        "",
        ("variables", None, "every combination of values is a point: a training and its evaluation"),
        ("  lora_rank", list(RANKS), "rank of the adapter"),
        ("  #lr", _Plain("[1e-4, 3e-4, 1e-3]"), "without the first '#': each rank at each of these rates"),
        "",
        ("controls", None, "what all points share"),
        ("  epochs", 1, "passes over the training data"),
        ("  batch_size", batch, "samples per step; as many as fit into memory"),
        ("  lr", _Plain("3e-4"), "peak learning rate"),
        *modules,
        "",
        ("trainer", model.trainer, trainer),
        "",
        ("model", None, "the base model"),
        ("  path", model.path, "a checkpoint directory, or org/name on the hub"),
        ("  dtype", "bf16" if device == "cuda" else "fp32", "precision; bf16 for GPUs"),
        ("  device", device, "cuda: a GPU for each job; or cpu"),
        "",
        ("data", None, "what is trained on"),
        ("  train", data.file, "JSON lines, a JSON array, CSV or Parquet"),
        *((f"  {key}", value, _DATA_COMMENTS[key]) for key, value in data.keys.items()),
        "",
        ("evaluation", None, "of each point, and of the model without an adapter"),
    ]
    if tasks:
        lines += [
            ("  model_format", "adapter", "what is kept of a point; hf: the whole model"),
            ("  merge_adapters", True, "evaluate a merged model, deleted afterwards; false: none is made"),
            ("  #max_tokens", _Plain("256"), "the most tokens of an answer, if the task has no limit"),
            ("  tasks", None, "Inspect tasks: file.py@task, or the name of a registered one"),
            *(f"    - {_show(task)}" for task in tasks),
        ]
    else:
        lines += [
            ("  enabled", False, "train only; to evaluate, put these two lines, without #, in place of this one:"),
            "  #tasks:",
            "  #  - tasks/mine.py@mine               # an Inspect task: file.py@task, or a registered name",
        ]
    return "".join((line if isinstance(line, str) else _write_line(*line)) + "\n" for line in lines)


_DATA_COMMENTS = {
    "format": "instruct, alpaca, chat, sharegpt or completion",
    "input_column": "the column of the user's turn",
    "output_column": "the column of the answer to learn",
    "messages_column": "the column of the list of messages",
    "conversations_column": "the column of the list of messages",
    "text_column": "the column of the text",
}


class _Plain(str):
    """Text that is written as it is."""


def _write_line(key: str, value: Any, comment: str) -> str:
    text = f"{key}:" if value is None else f"{key}: {_show(value)}"
    return f"{text:<{_COMMENT - 2}}  # {comment}" if comment else text


def _show(value: Any) -> str:
    """Return a value as YAML, in one line."""
    if isinstance(value, _Plain):
        return value
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")


def _choose_format(row: Mapping[str, Any], file: str) -> dict[str, str]:
    """Return `format` and the keys of columns that fit a row of a file."""
    for column in ("messages", "conversations"):
        messages = row.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            chat, key = ("sharegpt", "conversations") if "from" in messages[0] else ("chat", "messages")
            return {"format": chat, f"{key}_column": column}
    texts = [column for column, value in row.items() if isinstance(value, str)]
    if {"instruction", "output"} <= {*texts}:
        return {"format": "alpaca"}
    pair = next((pair for pair in PAIRS if {*pair} <= {*texts}), None)
    if pair is None and "text" not in texts and len(texts) == 2:
        pair = (texts[0], texts[1])
    if pair:
        return {"format": "instruct", "input_column": pair[0], "output_column": pair[1]}
    if "text" in texts or len(texts) == 1:
        return {"format": "completion", "text_column": "text" if "text" in texts else texts[0]}
    raise UnclearColumnsError(texts, file)


def _choose_modules(checkpoint: Checkpoint) -> str | list[str]:
    """Return the value of `lora_modules` for trl: all linear layers, or those of the attention if others are fused."""
    try:
        find_modules(checkpoint, Controls(lora_modules="all-linear"))
    except InputError:
        parts = [name.split(".") for name in get_architecture(checkpoint).layers]
        attention = [name[-1] for name in parts if len(name) > 1 and re.search("attn|attention", name[-2])]
        if not attention:
            raise
        return list(dict.fromkeys(attention))
    return "all-linear"
