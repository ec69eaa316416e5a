"""What a user's input can cause, and how it is told: one message, and the end of the process."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """What a user wrote, or a file the user named, cannot be used.

    The message is `<file>: <key>: <value> is invalid. Expected: <what would be accepted>`, one problem a line.
    """

    def __init__(self, problem: str, expected: str = "", *, file: Path | str = "") -> None:
        """Make the message.

        Args:
            problem: What is wrong, the key first.
            expected: What would be accepted; empty where `problem` says what to do.
            file: The file that is at fault, where it is another one than the experiment's.
        """
        self.problems = [f"{problem}. Expected: {expected}" if expected else problem]
        self.names_file = False
        super().__init__(problem, expected)
        if file:
            self.put_under(file)
            self.names_file = True

    @classmethod
    def join(cls, errors: Iterable["InputError"]) -> "InputError":
        """Return several problems as one error."""
        joined = cls("")
        joined.problems = [problem for error in errors for problem in error.problems]
        return joined

    def __str__(self) -> str:
        return "\n".join(self.problems)

    def put_under(self, place: Path | str) -> None:
        """Begin each problem with the place that it is in: a key, or a file."""
        self.problems = [f"{place}: {problem}" for problem in self.problems]


class JobError(RuntimeError):
    """A job cannot be done; the message says why, and is all that a person has to read."""


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """Have an InputError that is raised within begin with the key that led to it."""
    try:
        yield
    except InputError as error:
        error.put_under(key)
        raise


@contextmanager
def naming_file(file: Path | str) -> Iterator[None]:
    """Have an InputError that is raised within begin with a file, unless it names its own."""
    try:
        yield
    except InputError as error:
        if not error.names_file:
            error.put_under(file)
            error.names_file = True
        raise


FAULT = "The lines above are a fault of lorasweep, not of your input. Please report them, and the command that you ran."


def end(message: str) -> NoReturn:
    """End the process with a message for the user."""
    sys.exit(message)


@contextmanager
def ending_with_a_message() -> Iterator[None]:
    """End the process with a message alone, where the user or the machine is at fault; with a traceback, where we are.

    Snakemake prints what is raised below a Snakefile with a place in the code and its frames.
    """
    try:
        yield
    except Exception as error:
        end(_explain(error))


def call_to_the_end(function: Callable[[], None], prefix: str = "") -> None:
    """Call a function, and end the process as `ending_with_a_message` does if it fails; `prefix` names the job.

    The message is the last line: what the function left, such as a progress bar, is gone by then.
    """
    try:
        function()
        return
    except Exception as error:
        if prefix and _is_ours(error):
            raise  # a job runs tasks and trainers of others: whose fault it is, its traceback shows
        message = prefix + _explain(error)
    gc.collect()
    end(message)


def _is_ours(error: Exception) -> bool:
    return not isinstance(error, InputError | JobError | OSError)  # the last: no permission, no room, no such file


def _explain(error: Exception) -> str:
    if not _is_ours(error):
        return str(error)
    traceback.print_exception(error)
    return FAULT


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing if none is close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
