"""Pages of results: tables that sort, plots, and the templates that hold them. A page works offline."""

import json
import sys
from base64 import b64encode
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, CalledProcessError, Popen
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lorasweep.results.labels import plain
from lorasweep.util.formats import format_score
from lorasweep.util.vega import Plot, get_theme

_TEMPLATES = Path(__file__).parents[2] / "report"


@dataclass(frozen=True)
class Cell:
    """A cell of a table of the page."""

    text: str
    order: float | str = ""
    """What the column sorts by, if it is not the text."""
    link: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table of the page."""

    title: str
    cells: Sequence[Cell]
    kind: str = "number"
    """`name`, `number`, or `text` for a sentence; `aside` for what is left out of a print."""


@dataclass(frozen=True)
class Section:
    """A task, with its plots and its table."""

    title: str
    plots: Sequence[Plot]
    columns: Sequence[Column]
    best: Collection[int] = ()
    """The places of the best setting's rows."""


def start_bundling() -> Popen[str]:
    """Start to bundle the scripts that draw plots, for `render`.

    It takes a second, and vl-convert holds Python's lock meanwhile. A process of its own runs beside the drawing.
    """
    program = "import vl_convert; print(vl_convert.javascript_bundle())"
    return Popen([sys.executable, "-X", "utf8", "-c", program], stdout=PIPE, encoding="utf-8")


def render(template: str, plots: Sequence[Plot], bundling: Popen[str], **values: Any) -> str:
    """Return a page from a template in `workflow/report`, with the scripts that draw its plots and sort its tables.

    `bundling` is what `start_bundling` returned.

    Raises:
        CalledProcessError: the scripts could not be bundled.
    """
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    style, script = _get_datatables()
    return environment.get_template(template).render(
        specs=_as_script({plot.name: plot.spec for plot in plots}),
        theme=_as_script(get_theme("page")),
        vega=Markup(_end_bundling(bundling)),
        tables_style=style,
        tables_script=script,
        **values,
    )


def get_values(rows: pd.DataFrame, column: str) -> list[Any]:
    """Return the values of a column; `None` where there is none."""
    return [plain(value) for value in rows[column]] if column in rows else [None] * len(rows)


def list_numbers(rows: pd.DataFrame, column: str, title: str, sign: str = "") -> Column:
    """Return a column of scores or losses."""
    values = get_values(rows, column)
    texts = [None if value is None else format_score(value, sign) for value in values]
    return Column(title, [Cell(text, value) for text, value in pair(texts, values)])


def list_intervals(rows: pd.DataFrame, prefix: str, title: str, sign: str = "") -> Column:
    """Return a column of intervals, whose limits are in the columns `<prefix>low` and `<prefix>high`."""
    lows, highs = (get_values(rows, f"{prefix}{side}") for side in ("low", "high"))
    texts = [
        "" if low is None else f"{format_score(low, sign)} to {format_score(high, sign)}"
        for low, high in zip(lows, highs, strict=True)
    ]
    return Column(title, [Cell(text, low) for text, low in pair(texts, lows)])


def pair(texts: Sequence[str | None], orders: Sequence[Any]) -> list[tuple[str, Any]]:
    """Return cells' texts with what a column sorts by. Both are "" where there is no value."""
    return [(text or "", "" if order is None else order) for text, order in zip(texts, orders, strict=True)]


def _as_script(value: Any) -> Markup:
    """Return a value as JSON that is safe inside a script element."""
    return Markup(json.dumps(value).replace("</", "<\\/"))


def _end_bundling(bundling: Popen[str]) -> str:
    script, _ = bundling.communicate()
    if bundling.returncode:
        raise CalledProcessError(bundling.returncode, bundling.args)
    return script.replace("</script", "<\\/script")


def _get_datatables() -> tuple[Markup, str]:
    """Return the style and the script (in base64) of DataTables, which itables brings."""
    from itables import options

    bundle = Path(options.dt_bundle)
    style = bundle.with_suffix(".css").read_text(encoding="utf-8")
    return Markup(style.replace("</style", "<\\/style")), b64encode(bundle.read_bytes()).decode()
