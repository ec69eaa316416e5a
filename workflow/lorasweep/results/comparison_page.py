"""The page of a comparison of experiments. It works offline, as the report does, and has its looks."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lorasweep.experiment.points import format_value
from lorasweep.results.comparison import Comparison, Finished
from lorasweep.results.page import Cell, Column, Section, list_intervals, list_numbers, render, start_bundling
from lorasweep.results.plots import draw_comparison
from lorasweep.util.vega import Plot


def make_page(experiments: Sequence[Finished], comparisons: Sequence[Comparison], page: Path) -> None:
    """Write the page of comparisons of experiments. Links to the experiments' reports are relative to it."""
    bundling = start_bundling()
    higher = experiments[0].experiment.report.higher_is_better
    # Two comparisons can be of tasks with one name.
    drawn = [
        replace(draw_comparison(made.rows, made.task, made.metric, higher), name=f"compared-{number}")
        for number, made in enumerate(comparisons, 1)
    ]
    text = render(
        "comparison.html.jinja",
        drawn,
        bundling,
        name=" and ".join(experiment.name for experiment in experiments),
        comparisons=[
            {"made": made, "plot": plot, "section": _make_section(made, plot)}
            for made, plot in zip(comparisons, drawn, strict=True)
        ],
        names=[experiment.name for experiment in experiments],
        reports=[_find_report(experiment, page) for experiment in experiments],
        differences=_find_differences(experiments),
        made=datetime.now(UTC).isoformat(timespec="minutes"),
    )
    page.write_text(text, encoding="utf-8")


def _make_section(comparison: Comparison, plot: Plot) -> Section:
    rows, metric = comparison.rows, comparison.metric
    interval = f"{comparison.confidence:.0%} interval"
    columns = [Column(key, [Cell(value) for value in rows[key]], "name") for key in ("experiment", "setting")]
    columns += [Column("mode", [Cell(value) for value in rows["mode"]], "aside")]
    columns += [list_numbers(rows, metric, metric), list_intervals(rows, f"{metric}:", interval)]
    columns += [list_numbers(rows, f"{metric}:delta", "over own base", "+")]
    columns += [list_intervals(rows, f"{metric}:delta_", interval, "+")]
    for key in comparison.variables:
        texts = ["" if pd.isna(value) else format_value(value, key) for value in rows[key]]
        columns.append(Column(key, [Cell(text) for text in texts], "aside"))
    columns.append(Column("seeds", [Cell(str(value)) for value in rows["seeds"]]))
    return Section(comparison.task, [plot], columns)


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
