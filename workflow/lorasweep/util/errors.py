"""Errors in the user's input or environment, and how they end the process: with one message."""

import gc
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import dropwhile
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """A value in the user's configuration, or a file that it names, cannot be used.

    The message is `<file>: <key>: <value> is invalid. Expected: <accepted values>`, one line per problem.
    """

    def __init__(self, problem: str, expected: str = "", *, file: Path | str = "") -> None:
        """Make the message.

        Args:
            problem: What is wrong, the key first.
            expected: Accepted values; empty if `problem` already tells the user what to do.
            file: The file with the problem, if it is not the experiment file.
        """
        self.problems = [f"{problem}. Expected: {expected}" if expected else problem]
        self.names_file = False
        super().__init__(problem, expected)
        if file:
            self.put_under(file)
            self.names_file = True

    @classmethod
    def join(cls, errors: Iterable["InputError"]) -> "InputError":
        """Combine the problems of several errors in one error."""
        joined = cls("")
        joined.problems = [problem for error in errors for problem in error.problems]
        return joined

    def __str__(self) -> str:
        return "\n".join(self.problems)

    def put_under(self, place: Path | str) -> None:
        """Prefix each problem with its place: a key or a file."""
        self.problems = [f"{place}: {problem}" for problem in self.problems]


class JobError(RuntimeError):
    """A job failed for a reason that the message explains in full; no traceback is needed."""


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Prefix an InputError raised in this context with a key."""
    try:
        yield
    except InputError as error:
        error.put_under(key)
        raise


@contextmanager
def naming_file(file: Path | str) -> Iterator[None]:
    """Prefix an InputError raised in this context with a file, unless the error already names one."""
    try:
        yield
    except InputError as error:
        if not error.names_file:
            error.put_under(file)
            error.names_file = True
        raise


REASON = "Why this job failed:"
"""Line in a job's log: what follows is the whole reason of its failure."""

_TRACEBACK = "Traceback (most recent call last):"

FAULT = "The traceback above is a bug in lorasweep, not in your input. Please report it with the command that you ran."


def end(message: str) -> NoReturn:
    """End the process with a message for the user."""
    sys.exit(message)


@contextmanager
def ending_with_a_message() -> Iterator[None]:
    """End the process on an exception: with a message for errors of input or machine, with a traceback for bugs.

    Snakemake would print any exception from a Snakefile with its own traceback.
    """
    try:
        yield
    except Exception as error:
        end(_explain(error))


def call_to_the_end(function: Callable[[], None], prefix: str = "") -> None:
    """Call a function; if it fails, end the process like `ending_with_a_message`. `prefix` names the job.

    The message is printed last, after objects of the function such as progress bars are closed. That of a job follows
    the line `REASON`.
    """
    try:
        function()
        return
    except Exception as error:
        if prefix and _is_ours(error):
            traceback.print_exception(error)  # a job runs third-party tasks and trainers: it shows where the bug is
            message = describe(error)
        else:
            message = _explain(error)
    gc.collect()
    sys.stdout.flush()  # what was printed before stands before the message where both go to one file
    end(f"{REASON}\n{prefix}{message}" if prefix else message)


@contextmanager
def telling_the_log(log: Path, prefix: str) -> Iterator[None]:
    """Write why a job of this process fails to its log, as `call_to_the_end` prints it for a process of its own.

    Raises:
        JobError: it failed; the message is the log's last lines.
    """
    log.write_text("", encoding="utf-8")
    try:
        yield
    except Exception as error:
        trace = "".join(traceback.format_exception(error)) if _is_ours(error) else ""
        message = f"{prefix}{describe(error) if trace else error}"
        log.write_text(f"{trace}{REASON}\n{message}\n", encoding="utf-8")
        raise JobError(message) from None


def describe(error: BaseException) -> str:
    """Return the whole message of an exception: with its type, unless it is written for the user, and its causes."""
    if not _is_ours(error):
        return str(error) or type(error).__name__
    # Messages of Inspect have marks of bold text.
    text = re.sub(r"\[/?(?:bold|blue)\]", "", "".join(traceback.format_exception_only(error))).strip()
    cause = describe(error.__cause__) if error.__cause__ else ""
    return text if cause in text else f"{text}\ncaused by {cause}"


def find_reason(lines: Iterable[str]) -> str:
    """Return the whole reason of a failure from a process's output; "" if there is none.

    It is what follows the last line `REASON`, else the message of the last traceback.
    """
    said = [line.rstrip() for line in lines if line.strip()]
    for mark in (REASON, _TRACEBACK):
        if mark in said:
            after = said[len(said) - said[::-1].index(mark) :]
            # The frames of a traceback are indented.
            return "\n".join(after if mark == REASON else dropwhile(lambda line: line.startswith(" "), after))
    return ""


def _is_ours(error: BaseException) -> bool:
    return not isinstance(error, InputError | JobError | OSError)  # OSError: no permission, disk full, no such file


def _explain(error: Exception) -> str:
    if not _is_ours(error):
        return str(error)
    traceback.print_exception(error)
    return FAULT


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or "" if no word is close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
