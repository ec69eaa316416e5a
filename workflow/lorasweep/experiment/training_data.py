"""Check that files of training and validation data exist and have the format that the experiment declares."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from lorasweep.experiment.sections import Data
from lorasweep.util.errors import InputError, naming_file, nearest


def check_data(data: Data, key: Literal["train", "validation"] = "train") -> int:
    """Check every sample of the training or validation data, and return the number of samples that are used.

    The file is JSON lines (one object per line) or one JSON array of objects. For training data, the number is at most
    `max_samples`.

    Raises:
        InputError: The file is missing or empty, text is not JSON, or a sample lacks a column. The message names the
            place.
    """
    where = f"data.{key}"
    file = getattr(data, key)
    if file is None:
        raise InputError(
            f"{where}: is missing, and there are points to train",
            "a file of samples; or no 'variables', and an 'adapter' for each of 'runs'",
        )
    path = Path(file)
    if not path.is_file():
        raise InputError(f"{where}: no such file: {path}", "a file with JSON lines or one JSON array")
    count = 0
    for place, sample in _read_samples(path):
        with naming_file(place):
            _check_sample(sample, data)
        count += 1
    if count == 0:
        raise InputError(f"{where}: {path} has no samples", "at least one JSON object")
    return min(count, data.max_samples or count) if key == "train" else count


def _read_samples(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each sample. The place is the file with the line or array position, from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            start = next((line for line in file if line.strip()), "").lstrip()
            file.seek(0)
            if start.startswith("["):
                for number, sample in enumerate(_parse(file.read(), path), start=1):
                    yield f"{path}: sample {number}", sample
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _parse(line, path, number)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason} at byte {error.start})", file=path) from error


def _parse(text: str, path: Path, first: int = 1) -> Any:
    """Parse JSON text that begins on line `first` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{first + error.lineno - 1}"
        expected = "one JSON object per line, or one JSON array"
        raise InputError(f"not JSON ({error.msg}, column {error.colno})", expected, file=place) from error


def _check_sample(sample: Any, data: Data) -> None:
    if not isinstance(sample, dict):
        raise InputError(f"{str(sample)[:60]!r} is invalid", "a JSON object")
    if data.format == "instruct":
        for key in ("input_column", "output_column"):
            column = getattr(data, key)
            if column not in sample:
                raise InputError(
                    f"no column '{column}' (data.{key}){nearest(column, sample)}; it has: {', '.join(sample)}"
                )
            if not isinstance(sample[column], str) or not sample[column]:
                raise InputError(f"{column}: {sample[column]!r} is invalid", "text")
        return
    if data.format == "completion":
        text = sample.get(data.text_column)
        if not isinstance(text, str) or not text:
            raise InputError(
                f"no text in the column '{data.text_column}' (data.text_column)"
                f"{nearest(data.text_column, sample)}; it has: {', '.join(sample)}"
            )
        return
    messages = sample.get(data.messages_column)
    if not isinstance(messages, list) or not messages:
        raise InputError(
            f"no list of messages in the column '{data.messages_column}' (data.messages_column)"
            f"{nearest(data.messages_column, sample)}; it has: {', '.join(sample)}"
        )
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(message.get("content"), str):
            raise InputError(
                f"{data.messages_column}.{index}: {str(message)[:60]} is invalid",
                "an object with 'role' (system, user or assistant) and 'content' (text)",
            )
    roles = [message["role"] for message in messages]
    if roles[0] == "system" and data.system_prompt is not None:
        raise InputError(
            f"{data.messages_column}.0: a system message is invalid beside data.system_prompt, "
            "which would replace it in training",
            "one of the two",
        )
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(
            f"{data.messages_column}: the roles {', '.join(roles)} are invalid",
            "an optional system message, then user and assistant in turn, ending with assistant",
        )
