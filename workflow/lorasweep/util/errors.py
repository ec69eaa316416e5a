"""What a user's input can cause, and how it is told: one message, and the end of the process."""

import sys
import traceback
from collections.abc import Iterable, Iterator
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
    print(message, file=sys.stderr)
    sys.exit(1)


@contextmanager
def ending_with_a_message(prefix: str = "") -> Iterator[None]:
    """End the process with a message alone, where the user or the machine is at fault; with a traceback, where we are.

    Snakemake prints what is raised below a Snakefile with a place in the code and its frames.
    """
    try:
        yield
    except (InputError, JobError, OSError) as error:  # the last: no permission, no room, no such file
        end(f"{prefix}{error}")
    except Exception:
        traceback.print_exc()
        end(FAULT)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing if none is close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
