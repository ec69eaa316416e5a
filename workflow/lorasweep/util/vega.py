"""The theme of plots, and their output as SVG. Altair builds the specifications, vl-convert renders them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Colours of series, by Okabe and Ito. The first ones differ in grey prints too."""

WIDTH, HEIGHT = 560, 300
"""Size of a plot in pixels."""

_INK = {"light": "#1f2328", "dark": "#e6e6e6", "page": "currentColor"}

_FAINT = {"light": "#d8dee4", "dark": "#3d444d", "page": "#8b949e55"}

_PAPER = {"light": "#ffffff", "dark": "#0d1117", "page": "transparent"}


@dataclass(frozen=True)
class Plot:
    """A plot with its caption."""

    name: str
    title: str
    caption: str
    spec: Mapping[str, Any]
    """The Vega-Lite specification."""

    @property
    def least_width(self) -> int:
        """The width in pixels below which its labels leave too little room; 0 if it fits anywhere."""
        return int(self.spec.get("usermeta", {}).get("width", 0))


def get_theme(theme: str) -> dict[str, Any]:
    """Return the Vega-Lite configuration of the theme `light`, `dark`, or `page`, with the page's text colour."""
    ink, faint = _INK[theme], _FAINT[theme]
    axis = {"labelColor": ink, "titleColor": ink, "gridColor": faint, "domainColor": ink, "tickColor": ink}
    shades = {"scheme": "viridis", "extent": [0.2, 0.9]}  # what can be seen on both grounds
    return {
        "background": _PAPER[theme],
        "font": "system-ui, Helvetica, Arial, sans-serif",
        "view": {"stroke": faint},
        "axis": axis
        | {"gridOpacity": 0.6, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
        | {"labelLimit": 560},
        "axisQuantitative": {"labelOverlap": "greedy", "labelSeparation": 8, "labelFlush": False},
        "legend": {
            "labelColor": ink,
            "titleColor": ink,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "gradientLength": 140,
            "symbolStrokeWidth": 2.5,
        },
        "header": {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontWeight": "normal"},
        "title": {"color": ink},
        "range": {
            "category": list(SERIES),
            "heatmap": {"scheme": "viridis"},
            "ramp": shades,
            "ordinal": shades,
        },
        "text": {"color": ink},
        "rule": {"color": ink},
    }


def write_picture(plot: Plot, file: Path, theme: str = "light") -> None:
    """Write a plot as SVG."""
    import vl_convert

    file.write_text(vl_convert.vegalite_to_svg(dict(plot.spec), config=get_theme(theme)), encoding="utf-8")


def write_pictures(plots: Sequence[Plot], folder: Path) -> None:
    """Write each plot as `<name>.svg` and, for dark pages, `<name>-dark.svg`."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            write_picture(plot, folder / f"{plot.name}{suffix}.svg", theme)


def finish(name: str, title: str, caption: str, chart: Any) -> Plot:
    """Return a chart as a plot, with the default size where the chart sets none."""
    if isinstance(chart, alt.LayerChart) and chart.width is alt.Undefined:
        chart = chart.properties(width=WIDTH)
    if isinstance(chart, alt.LayerChart | alt.Chart) and chart.height is alt.Undefined:
        chart = chart.properties(height=HEIGHT)
    if isinstance(chart, alt.Chart):
        chart = chart.properties(width=WIDTH)
    spec = chart.to_dict()
    del spec["config"]
    return Plot(name, title, caption.strip(), spec)
