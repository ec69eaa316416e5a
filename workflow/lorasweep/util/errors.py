"""What a user's input can cause, and how it is told: one message, and the end of the process."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import NoReturn


class InputError(ValueError):
    """What a user wrote, or a file the user named, cannot be used.

    The message names the file, the key, the value seen and what would be accepted, one problem a line.
    """


class JobError(RuntimeError):
    """A job cannot be done; the message says why, and is all that a person has to read."""


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
