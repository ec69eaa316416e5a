"""Read the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from lorasweep.util.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: The file has no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{file}' is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' is not a JSON object; fetch it again")
    return content


def find_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no file.

    Raises:
        InputError: The file has no JSON object.
    """
    return read_json(file) if file.is_file() else {}
