"""Labels of points and settings: in plots and tables, each is named by what differs among those shown."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import pandas as pd

from lorasweep.experiment.points import SEPARATOR, format_value
from lorasweep.experiment.sections import BASE_KEY, MODE_KEY

LONGEST = 32
"""Maximum number of characters of a value in a label. Only prompts and lists of modules are longer."""

GAP = ", "
"""Separator of the parts of a label."""


def get_differing(rows: pd.DataFrame, variables: Sequence[str]) -> list[str]:
    """Return the variables of which the trained rows have several values. `null` is a value as any other."""
    known = get_trained(rows)
    return [key for key in variables if key in rows and known[key].nunique(dropna=False) > 1]


def get_trained(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of points or settings that were trained here; without any, all rows.

    Baselines and existing adapters have no values of most variables, which is not the value `null`.
    """
    trained = rows[is_trained(rows)]
    return trained if len(trained) else rows


def is_trained(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Return of each point or setting whether it was trained here, and so has a value of every variable."""
    return rows["lora_scale"].notna()


def label_points(table: pd.DataFrame, variables: Sequence[str]) -> dict[str, str]:
    """Return the label of each point of a table of points."""
    return _label(table.drop_duplicates("point").set_index("point"), variables)


def label_settings(table: pd.DataFrame, variables: Sequence[str]) -> dict[str, str]:
    """Return the label of each setting of a table of points, by its name and by the one that its modes share."""
    keys = [key for key in variables if key != "seed"]
    shared, own = (table.drop_duplicates(name).set_index(name) for name in ("trained_setting", "setting"))
    return _label(shared, [key for key in keys if key != MODE_KEY]) | _label(own, keys)


def shorten(values: Iterable[Any], key: str) -> dict[str, str]:
    """Return the values of a key as short text, by their whole text.

    Long texts lose the words that all of them begin or end with, and what is beyond `LONGEST` characters.
    """
    texts = list(dict.fromkeys(format_value(plain(value), key) for value in values))
    words = {text: re.findall(r"\s*\S+", text) for text in texts if len(text) > LONGEST}
    begin, end = 0, 0
    if len(words) > 1:
        begin = _count_shared(list(words.values()))
        end = _count_shared([own[begin:][::-1] for own in words.values()])
    return {text: _cut(words[text], begin, end) if text in words else text for text in texts}


def plain(value: Any) -> Any:
    """Return a value of a data frame as a Python value; floats that are whole numbers become int, and NA `None`."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, list) and pd.isna(value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def _count_shared(lists: Sequence[Sequence[str]]) -> int:
    """Return how many of their first entries all lists have in common."""
    return sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False)))


def _cut(words: Sequence[str], begin: int, end: int) -> str:
    text = "".join(words[begin : len(words) - end]).strip()
    is_cut = len(text) > LONGEST
    text = text[: LONGEST - 1].rstrip() if is_cut else text
    return f"{'…' if begin else ''}{text}{'…' if end or is_cut else ''}"


def _label(rows: pd.DataFrame, variables: Sequence[str]) -> dict[str, str]:
    """Return the label of each row, whose index is its name. A run, a baseline and an adapter keep their own names."""
    names = [str(name) for name in rows.index]
    varied = [name for name in names if all("=" in part for part in name.split(SEPARATOR))]
    swept = rows.loc[varied]
    keys = get_differing(swept, list(dict.fromkeys([*variables, BASE_KEY, MODE_KEY])))
    short: Mapping[str, Mapping[str, str]] = {key: shorten(swept[key], key) for key in keys}
    labels = {name: name.replace(SEPARATOR, GAP) for name in names}
    made = {
        name: GAP.join(f"{key}={short[key][format_value(plain(row[key]), key)]}" for key in keys)
        for name, row in swept.iterrows()
    }
    taken = pd.Series([*made.values(), *(name for name in names if name not in made)]).value_counts()
    return labels | {str(name): label for name, label in made.items() if label and taken[label] == 1}
