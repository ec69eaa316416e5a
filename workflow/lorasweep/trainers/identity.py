"""The identity of a training, the digest of what determines its result, in the first line of its recipe."""

from pathlib import Path

_HEADER = "# training sha256: "
"""Start of the first line of a recipe; its identity follows."""


def head_recipe(recipe: str, identity: str) -> str:
    """Return a recipe with its identity in its first line."""
    return f"{_HEADER}{identity}\n{recipe}"


def read_identity(recipe: Path) -> str | None:
    """Return the identity in the first line of a recipe; `None` if it has none."""
    with recipe.open(encoding="utf-8", errors="replace") as file:
        line = file.readline()
    return line.removeprefix(_HEADER).strip() if line.startswith(_HEADER) else None
