"""Tables for the terminal: a name folds between its parts only, and a number never does.

Rich breaks what is too long for its column at any character, and cuts columns that do not fit.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

_PART = re.compile(r".+?(?:__+|[/ ]|$)")
"""A part of a name, with what separates it from the next: `__` in names of points, `/` in metrics, a blank."""

_SMALLER_PART = re.compile(r".+?(?:[_+.=-]|$)")
"""What a part that is wider than the whole terminal is broken into."""


_MARGIN = 1
_GAP = 2
"""Blanks before the first column, and between columns."""

_HEADER_LINES = 4
"""Lines of a table without rows: a blank one, the titles, a rule, a blank one."""


class _Row(NamedTuple):
    cells: Sequence[str]
    style: str


class FoldingTable:
    """A table that fits the terminal. Printed by a rich console.

    Whole if there is room; else with folded titles and names. Where the longest part of a name leaves no room for the
    other columns, names have lines of their own, above the numbers. Columns for which there is still no room follow in
    a table of their own, with the names again.
    """

    def __init__(
        self,
        columns: Sequence[str],
        *,
        texts: Collection[str] = (),
        name: int = 0,
        title: str = "",
        most_lines: int | None = None,
    ) -> None:
        """Make a table without rows.

        Args:
            columns: The columns' titles.
            texts: The titles of columns that are aligned to the left, besides that of names.
            name: The position of the column of names, which may fold.
            title: What stands above the table.
            most_lines: The most lines of rows; rows beyond, but for the first three, are counted. `None`: no limit.
        """
        self.columns = columns
        self.title = title
        self.more = 0
        """Number of rows that are not in the table, and are counted below it."""
        self._most_lines = most_lines
        self._texts = texts
        self._name = name
        self._rows: list[_Row] = []

    def add_row(self, *cells: str, style: str | None = None) -> None:
        """Add a row. Missing cells are empty."""
        self._rows.append(_Row([*cells, *[""] * (len(self.columns) - len(cells))], style or ""))

    def __len__(self) -> int:
        return len(self._rows)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.title:
            yield Text(fold(self.title, options.max_width), style="table.title")
        tables = list(self._choose_widths(options.max_width))
        rows = self._rows[: self._count_fitting(tables, options.max_width)]
        for widths in tables:
            lines = self._write(rows, widths, options.max_width)
            yield Text("\n").join(Text(line, style=style) for line, style in lines)
        if more := len(self._rows) - len(rows) + self.more:
            yield Text(f"{' ' * _MARGIN}... {more} more\n")

    def _count_fitting(self, tables: Sequence[dict[int, int]], room: int) -> int:
        """Return how many rows fit into `most_lines`, as these tables fold them; at least three."""
        if self._most_lines is None:
            return len(self._rows)
        lines = [sum(1 for widths in tables for _ in self._write_row(row.cells, widths, room)) for row in self._rows]
        # More than the lines of one plain header is at the rows' expense.
        headers = sum(1 for widths in tables for _ in self._write([], widths, room)) - _HEADER_LINES
        return max(3, sum(total + headers <= self._most_lines for total in accumulate(lines)))

    def _choose_widths(self, room: int) -> Iterator[dict[int, int]]:
        """Yield the columns of each table that fits into `room` characters, with their widths.

        In a table without the column of names, these have lines of their own.
        """
        others = [index for index in range(len(self.columns)) if index != self._name]
        names = [self.columns[self._name], *(row.cells[self._name] for row in self._rows)]
        whole = max(map(cell_len, names))
        widths = {index: max(map(cell_len, self._list_cells(index, has_title=True))) for index in others}
        if _add([whole, *widths.values()]) <= room:
            yield {self._name: whole, **widths}
            return
        for index in others:
            longest = max(map(cell_len, [*self._list_cells(index), *_list_parts(self.columns[index])]))
            # Numbers are not as wide as that; reasons why a job waits can be.
            widths[index] = min(longest, max(1, room // (3 if self.columns[index] in self._texts else 2)))
        longest_part = max(cell_len(part) for name in names for part in _list_parts(name))
        if _add([longest_part, *widths.values()]) <= room:
            yield {self._name: min(whole, room - _add([0, *widths.values()])), **widths}
            return
        block: dict[int, int] = {}
        for index in others:
            if block and _GAP + _add([*block.values(), widths[index]]) > room:
                yield block
                block = {}
            block[index] = widths[index]
        yield block

    def _list_cells(self, index: int, has_title: bool = False) -> list[str]:
        return [*([self.columns[index]] if has_title else [""]), *(row.cells[index] for row in self._rows)]

    def _write(self, rows: Sequence[_Row], widths: dict[int, int], room: int) -> Iterator[tuple[str, str]]:
        """Yield the lines of a table, each with its style."""
        yield "", ""
        lines = list(self._write_row(self.columns, widths, room))
        yield from ((line, "table.header") for line in lines)
        indent = "" if self._name in widths else " " * _GAP
        yield " " * _MARGIN + "─" * (_add(list(widths.values())) + len(indent) - _MARGIN), ""
        for row in rows:
            yield from ((line, row.style) for line in self._write_row(row.cells, widths, room))
        yield "", ""

    def _write_row(self, cells: Sequence[str], widths: dict[int, int], room: int) -> Iterator[str]:
        indent = " " * _MARGIN
        if self._name not in widths:
            yield from (indent + line for line in fold(cells[self._name], room - _MARGIN).split("\n"))
            indent += " " * _GAP
        folded = {index: fold(cells[index], widths[index]).split("\n") for index in sorted(widths)}
        for number in range(max(map(len, folded.values()), default=0)):
            parts = []
            for index, lines in folded.items():
                line = lines[number] if number < len(lines) else ""
                blanks = " " * (widths[index] - cell_len(line))
                is_text = index == self._name or self.columns[index] in self._texts
                parts.append(line + blanks if is_text else blanks + line)
            yield (indent + (" " * _GAP).join(parts)).rstrip()


def _add(widths: Sequence[int]) -> int:
    """Return the width of a line with columns of these widths."""
    return _MARGIN + sum(widths) + _GAP * (len(widths) - 1)


def fold(text: str, width: int) -> str:
    """Return a text in lines of at most `width` characters, broken after `__`, `/` or a blank.

    Only a part that is longer than a line is broken within: after one of `_ + . = -`, or else anywhere.
    """
    lines = [""]
    for part in _list_pieces(text, width):
        if lines[-1] and cell_len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _list_parts(text: str) -> list[str]:
    return [part.rstrip() for part in _PART.findall(text)] or [""]


def _list_pieces(text: str, width: int) -> Iterator[str]:
    """Yield the parts of a text; of one that is wider than `width`, pieces that are not."""
    for part in _PART.findall(text):
        if cell_len(part.rstrip()) <= width:
            yield part
            continue
        for piece in _SMALLER_PART.findall(part):
            while cell_len(piece.rstrip()) > width:
                head = set_cell_size(piece, width).rstrip()
                yield head
                piece = piece[len(head) :]
            yield piece
