"""The page of a comparison of experiments. It works offline, as the report does, and has its looks."""

import html
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from lorasweep.experiment.points import format_value
from lorasweep.results.comparison import Comparison, Finished
from lorasweep.results.plots import draw_comparison
from lorasweep.results.report import get_table_scripts, make_sortable, render


def make_page(experiments: Sequence[Finished], comparisons: Sequence[Comparison], page: Path) -> None:
    """Write the page of comparisons of experiments. Links to the experiments' reports are relative to it."""
    higher = experiments[0].experiment.report.higher_is_better
    drawn = [draw_comparison(made.rows, made.task, made.metric, higher) for made in comparisons]
    text = render(
        "comparison.html.jinja",
        drawn,
        name=" and ".join(experiment.name for experiment in experiments),
        comparisons=[
            {"made": made, "plot": plot, "table": Markup(_make_table(made, f"results-{number}"))}
            for number, (made, plot) in enumerate(zip(comparisons, drawn, strict=True), 1)
        ],
        table_scripts=Markup(get_table_scripts()),
        names=[experiment.name for experiment in experiments],
        reports=[_find_report(experiment, page) for experiment in experiments],
        differences=_find_differences(experiments),
        made=datetime.now(UTC).isoformat(timespec="minutes"),
    )
    page.write_text(text, encoding="utf-8")


def _make_table(comparison: Comparison, name: str) -> str:
    rows, metric = comparison.rows, comparison.metric
    columns: list[tuple[str, list[Any]]] = [(key, list(rows[key])) for key in ("experiment", "setting", "mode")]
    columns += [(metric, _round(rows[metric])), ("interval", _join(rows, metric, ""))]
    if f"{metric}:delta" in rows:
        columns.append(("over own base", _round(rows[f"{metric}:delta"])))
        columns.append(("its interval", _join(rows, metric, "delta_")))
    columns += [(key, [format_value(v, key) if pd.notna(v) else "" for v in rows[key]]) for key in comparison.variables]
    columns.append(("seeds", list(rows["seeds"])))
    cells = {place: [_escape(value) for value in values] for place, (_, values) in enumerate(columns)}
    frame = pd.DataFrame(cells)
    frame.columns = pd.Index([html.escape(title) for title, _ in columns])
    return make_sortable(frame, name)


def _escape(value: Any) -> Any:
    return html.escape(value) if isinstance(value, str) else value


def _round(values: "pd.Series[Any]") -> list[Any]:
    return ["" if pd.isna(value) else round(float(value), 3) for value in values]


def _join(rows: pd.DataFrame, metric: str, prefix: str) -> list[str]:
    """Return the intervals of a metric, or of its gains, as text; "" where there is none."""
    if f"{metric}:{prefix}low" not in rows:
        return [""] * len(rows)
    limits = zip(rows[f"{metric}:{prefix}low"], rows[f"{metric}:{prefix}high"], strict=True)
    return ["" if pd.isna(low) else f"{low:.3f} to {high:.3f}" for low, high in limits]


def _find_report(experiment: Finished, page: Path) -> str:
    """Return the path of an experiment's report from the folder of a page; "" if it has none."""
    report = (experiment.folder / "report.html").resolve()
    return Path(os.path.relpath(report, page.resolve().parent)).as_posix() if report.is_file() else ""


def _find_differences(experiments: Sequence[Finished]) -> list[tuple[str, list[str]]]:
    """Return each key of the experiments' files that is not the same in all, with its values."""
    flat = [dict(_flatten(e.experiment.model_dump(by_alias=True, exclude={"experiment"}))) for e in experiments]
    keys = dict.fromkeys(key for values in flat for key in values)
    spelled = {key: [_spell(values.get(key)) for values in flat] for key in keys}
    return [(key, values) for key, values in spelled.items() if len(set(values)) > 1]


def _flatten(section: Mapping[str, Any], path: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in section.items()
        for pair in (
            _flatten(value, f"{path}{key}.") if isinstance(value, Mapping) and value else [(f"{path}{key}", value)]
        )
    ]


def _spell(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_spell(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_spell, value)) + "]"
    return format_value(value)
