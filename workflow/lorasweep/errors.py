"""The one exception that a user's input can cause."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """What a user wrote, or a file the user named, cannot be used.

    The message names the file, the key, the value seen and what would be accepted, one problem a line.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known word closest to ``word``, or nothing if none is close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
