"""Read training and validation data as they are written, and check their format.

The check before a run, the count of tokens and the trainers all read samples here, so that they see the same.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lorasweep.experiment.sections import PARTS, Data, DataKey
from lorasweep.util.errors import InputError, naming_file, naming_key, nearest
from lorasweep.util.files import get_state

FILES = "JSON lines, one JSON array, CSV (.csv) or Parquet (.parquet)"
"""The accepted kinds of files, for messages."""

_SHOWN = 60
"""Number of characters of an invalid value that a message shows."""

_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

_BLANK = re.compile(r"[ \t\r\n]*")


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


class Sample(NamedTuple):
    """A sample, whatever its file and format."""

    place: str
    """The file, with the sample's first line or, in Parquet, its row; both are counted from 1."""
    messages: tuple[Message, ...] = ()
    """An optional system message, then user and assistant in turn; empty for plain text."""
    text: str | None = None
    """The text of a `completion` sample."""

    @property
    def size(self) -> int:
        """Bytes of the sample's text in UTF-8."""
        return sum(len(text.encode()) for text in (self.text or "", *(message.content for message in self.messages)))


class DataSize(NamedTuple):
    """The amount of the data that is used."""

    samples: int
    size: int
    """Bytes of text."""


def read_samples(
    files: Sequence[str],
    format: str,
    columns: Mapping[str, str],
    max_samples: int | None = None,
    system_prompt: str | None = None,
) -> Iterator[Sample]:
    """Yield the samples of files, in order.

    Args:
        files: Files of JSON lines, a JSON array, CSV or Parquet.
        format: The value of `data.format`.
        columns: The columns of this format, as in `Data.columns`.
        max_samples: The most samples to read; `None`: all.
        system_prompt: The system prompt of all samples; with one, a sample must not have a system message.

    Raises:
        InputError: A file cannot be read, or a sample is invalid. The message names the file with the line or row.
    """
    rows = (row for file in files for row in _read_rows(Path(file)))
    for place, row in islice(rows, max_samples):
        with naming_file(place):
            sample = _make_sample(place, row, format, columns, system_prompt)
        yield sample


def check_data(data: Data, key: DataKey = "train", where: str = "") -> DataSize:
    """Check every sample of the training or validation data; return how much of it is used.

    `max_samples` limits the training data only. The result is cached as long as the files do not change. `where` names
    the files' key in messages, if that is not `data.<key>`.

    Raises:
        InputError: A file is missing or empty, or `read_samples` fails.
    """
    place, where, files = where, where or f"data.{key}", data.get_files(key)
    if not files:
        raise InputError(
            f"{where}: is missing, and there are points to train",
            "a file of samples; or no 'variables', and an 'adapter' for each of 'runs'",
        )
    for file in files:
        if not Path(file).is_file():
            raise InputError(f"{where}: no such file: {file}", f"a file of {FILES}")
    # The check depends on whether there is a system prompt, and neither on its text nor on the other settings.
    most = data.max_samples if key == "train" else None
    columns = tuple(data.columns.items())
    with naming_key(place) if place else nullcontext():
        sizes = [_check_file(f, get_state(Path(f)), data.format, columns, bool(data.system_prompt)) for f in files]
    for file, sample_sizes in zip(files, sizes, strict=True):
        if not sample_sizes:
            raise InputError(f"{where}: {file} has no samples", "at least one")
    used = [size for sample_sizes in sizes for size in sample_sizes][:most]
    return DataSize(len(used), sum(used))


@lru_cache(maxsize=1000)
def _check_file(
    file: str, state: Any, format: str, columns: tuple[tuple[str, str], ...], has_system_prompt: bool
) -> Sequence[int]:
    """Return the size of each sample of a file. `state` makes the cache forget a file that has changed."""
    system_prompt = "given" if has_system_prompt else None
    return [sample.size for sample in read_samples([file], format, dict(columns), None, system_prompt)]


def read_first_row(file: str) -> dict[str, Any]:
    """Return the first row of a file, by column, for what asks which columns it has. Its values are not checked.

    Raises:
        InputError: The file cannot be read, has no rows, or its first row has no columns.
    """
    place, row = next(_read_rows(Path(file)), (file, None))
    if row is None:
        raise InputError("no samples", "at least one", file=file)
    if not isinstance(row, dict):
        raise InputError(f"{_show(row)} is invalid", "a JSON object", file=place)
    return row


# Rows of files: a place and a mapping, whose values are not checked.


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    read: Mapping[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {".csv": _read_csv, ".parquet": _read_parquet}
    return read.get(path.suffix.lower(), _read_json)(path)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line. A byte order mark at the start is skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 text ({error.reason} at byte {error.start + 1} of the line)"
                raise InputError(problem, "text in UTF-8", file=f"{path}:{number}") from error


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    lines = _read_lines(path)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            yield from _read_array("".join([line, *(text for _, text in lines)]), path, number)
            return
        is_first = False
        line = line.rstrip()
        sample, end = _decode(line, _skip_blank(line, 0), path, number)
        if end < len(line):
            raise _refuse_json("Extra data", line, end, path, number)
        yield f"{path}:{number}", sample


def _read_array(text: str, path: Path, line: int) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON array, whose text begins in a line of a file."""
    first, counted = line, 0
    end = _skip_blank(text, text.index("[") + 1)
    is_over = text.startswith("]", end)
    while not is_over:
        line += text.count("\n", counted, end)
        counted = end
        sample, end = _decode(text, end, path, first)
        yield f"{path}:{line}", sample
        is_over = text.startswith("]", end)
        if not is_over and not text.startswith(",", end):
            raise _refuse_json("Expecting ',' delimiter", text, end, path, first)
        end = end if is_over else _skip_blank(text, end + 1)
    if (end := _skip_blank(text, end + 1)) < len(text):
        raise _refuse_json("Extra data", text, end, path, first)


def _skip_blank(text: str, start: int) -> int:
    match = _BLANK.match(text, start)
    assert match
    return match.end()


def _decode(text: str, start: int, path: Path, first: int) -> tuple[Any, int]:
    """Return the JSON value at a position of text, which begins in line `first`, and where the next one begins."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise _refuse_json(error.msg, text, error.pos, path, first) from error
    except (ValueError, RecursionError) as error:
        with naming_file(f"{path}:{first + text.count(chr(10), 0, start)}"):
            if isinstance(error, InputError):
                raise
            # A number of thousands of digits, or thousands of lists in each other.
            raise InputError(f"JSON that cannot be read ({error})") from error
    return value, _skip_blank(text, end)


def _refuse_json(problem: str, text: str, position: int, path: Path, first: int) -> InputError:
    error = json.JSONDecodeError(problem, text, position)
    return InputError(
        f"not JSON ({problem}, column {error.colno})",
        "one JSON object per line, or one JSON array; or CSV or Parquet in a file named .csv or .parquet",
        file=f"{path}:{first + error.lineno - 1}",
    )


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise InputError(f"the key {_find_duplicate([key for key, _ in pairs])!r} is there twice", "each key once")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_duplicates)


def _find_duplicate(names: Sequence[str]) -> str | None:
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader((line for _, line in _read_lines(path)), strict=True)
    header: list[str] = []
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(f"not CSV ({error})", "cells joined by commas, in quotes if needed", file=place) from error
        if cells is None:
            return
        if not cells:
            continue
        if not header:
            header = cells
            if name := _find_duplicate(header):
                raise InputError(f"the column {name!r} is there twice", "each column once", file=place)
        elif len(cells) != len(header):
            problem = f"the row has {len(cells)} cells, but the header has {len(header)} columns"
            raise InputError(problem, "as many; text with commas or line breaks in quotes", file=place)
        else:
            yield place, dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            if name := _find_duplicate(file.schema_arrow.names):
                raise InputError(f"the column {name!r} is there twice", "each column once", file=path)
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except ArrowException as error:
        raise InputError(
            f"not Parquet ({str(error).splitlines()[0]})", "Parquet, as its name says", file=path
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason}) after row {number}", "text in UTF-8", file=path) from error


# Samples made of rows.


def _make_sample(place: str, row: Any, format: str, columns: Mapping[str, str], system_prompt: str | None) -> Sample:
    if not isinstance(row, dict):
        raise InputError(f"{_show(row)} is invalid", "a JSON object")
    if format == "completion":
        return Sample(place, text=_get_text(row, columns, "text"))
    if format == "instruct":
        question = _get_text(row, columns, "input")
        return Sample(place, _pair(question, _get_text(row, columns, "output")))
    if format == "alpaca":
        question = _get_text(row, columns, "instruction")
        if row.get(columns["input"]) not in (None, ""):
            question += f"\n\n{_get_text(row, columns, 'input')}"
        return Sample(place, _pair(question, _get_text(row, columns, "output")))
    key = "conversations" if format == "sharegpt" else "messages"
    parse = _parse_sharegpt_message if format == "sharegpt" else _parse_message
    messages = _get(row, columns, key)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{columns[key]}: {_show(messages)} is invalid", "a list of messages")
    parsed = tuple(parse(message, f"{columns[key]}.{index}") for index, message in enumerate(messages))
    _check_roles(parsed, columns[key], system_prompt)
    return Sample(place, parsed)


def _pair(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


def _get(row: Mapping[str, Any], columns: Mapping[str, str], part: str) -> Any:
    column = columns[part]
    if column not in row:
        problem = f"no column '{column}' (data.{part}_column){nearest(column, row)}; it has: {', '.join(row) or 'none'}"
        fitting = [f"data.format: {format}" for format, parts in PARTS.items() if row.keys() >= set(parts)]
        raise InputError(problem, f"this column, or {' or '.join(fitting)}" if fitting else "")
    return row[column]


def _get_text(row: Mapping[str, Any], columns: Mapping[str, str], part: str) -> str:
    value = _get(row, columns, part)
    if not value:
        raise InputError(f"{columns[part]}: {_show(value)} is invalid", "text that is not empty")
    return _check_text(value, columns[part])


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {_show(value)} is invalid", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start + 1} is a lone surrogate ({value[error.start]!a}), which is no text",
            "both surrogates of the pair, or another character",
        ) from error
    return value


def _parse_message(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant") or not isinstance(message.get("content"), str):
        expected = "an object with 'role' (system, user or assistant) and 'content' (text)"
        raise InputError(f"{where}: {_show(message)} is invalid", expected)
    _refuse_unread(message, str(role), where)
    return Message(str(role), _check_text(message["content"], f"{where}.content"))


def _parse_sharegpt_message(message: Any, where: str) -> Message:
    role = message.get("from") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES or not isinstance(message.get("value"), str):
        expected = f"an object with 'from' ({', '.join(_SHAREGPT_ROLES)}) and 'value' (text)"
        raise InputError(f"{where}: {_show(message)} is invalid", expected)
    _refuse_unread(message, _SHAREGPT_ROLES[role], where)
    return Message(_SHAREGPT_ROLES[role], _check_text(message["value"], f"{where}.value"))


def _refuse_unread(message: Mapping[str, Any], role: str, where: str) -> None:
    """Refuse an answer with keys that say what is learnt of it, and are not read."""
    weight = message.get("weight")
    if role == "assistant" and weight is not None and weight != 1:
        raise InputError(
            f"{where}.weight: {_show(weight)} is invalid: every answer is learnt",
            "1, or no weight; what is not to be learnt, in the message of the user",
        )
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise InputError(
                f"{where}.{key}: {_show(message[key])} is invalid: only the text of a message is learnt",
                "the call as text in the message, or a sample without it",
            )


def _check_roles(messages: Sequence[Message], column: str, system_prompt: str | None) -> None:
    roles = [message.role for message in messages]
    if roles[0] == "system" and system_prompt is not None:
        raise InputError(f"{column}.0: a system message is invalid beside data.system_prompt", "one of the two")
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or len(turns) % 2 or turns != ["user", "assistant"] * (len(turns) // 2):
        raise InputError(
            f"{column}: the roles {', '.join(roles)} are invalid",
            "an optional system message, then user and assistant in turn, ending with assistant",
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
