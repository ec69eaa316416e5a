"""The plots of a sweep, as Vega-Lite specifications for both the picture files and the interactive report.

The kind of plot depends on the number of variables. All plots are readable in grey: cells show their values, series
have different shapes, and colour scales run from dark to light.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from lorasweep.experiment.points import format_value
from lorasweep.layout import BASELINE
from lorasweep.util.vega import SERIES, WIDTH, Plot, finish

MOST_ROWS = 40
"""Maximum number of settings in a list. Of more settings, the best are shown."""

MOST_NAMED = 12
"""Maximum number of loss curves with a legend. In the report, a tooltip names each curve."""

MOST_STEPS, MOST_DOTS = 400, 40_000
"""Maximum number of points of one loss curve, and of all curves. Steps are averaged to stay below."""

MOST_MOMENTS = 1000
"""Maximum number of points of a storage curve."""

alt.data_transformers.disable_max_rows()  # the limits above bound the data


def get_plotted_variables(settings: pd.DataFrame, variables: Sequence[str]) -> list[str]:
    """Return the variables that differ between settings, except `seed`, which distinguishes replicates."""
    return [key for key in variables if key != "seed" and key in settings and settings[key].dropna().nunique() > 1]


def draw_metric(
    settings: pd.DataFrame,
    points: pd.DataFrame,
    variables: Sequence[str],
    task: str,
    metric: str,
    higher_is_better: bool = True,
) -> list[Plot]:
    """Draw a metric on a task: one plot by the variables, and one list of all settings.

    `settings` is the table from `replicates.aggregate`, `points` the table of points.
    """
    settings = settings[(settings["task"] == task) & settings[metric].notna()]
    points = points[(points["task"] == task) & points[metric].notna()]
    base = settings[settings["setting"] == BASELINE]
    rows = settings[settings["mode"] != "base"]
    if rows.empty:
        return []
    plotted = get_plotted_variables(rows, variables)
    grid = rows.dropna(subset=plotted)
    drawn = []
    if plotted and len(grid) > 1:
        draw: Any = {1: _draw_line, 2: _draw_heat_map, 3: _draw_multiples}.get(len(plotted), _draw_parallel)
        chart, caption = draw(grid, points, base, plotted, metric)
        if without := len(rows) - len(grid):
            caption += f" Not drawn: {without} settings where a variable is null or has no value."
        drawn.append(finish(f"{task}-by-{'-'.join(plotted[:3])}", f"{metric} on {task}", caption, chart))
    chart, caption = _draw_list(settings[settings["setting"] != BASELINE], base, metric, not higher_is_better)
    drawn.append(finish(f"{task}-settings", f"{metric} on {task}, every setting", caption, chart))
    return drawn


def draw_comparison(rows: pd.DataFrame, task: str, metric: str, higher_is_better: bool = True) -> Plot:
    """Draw a metric of the settings of several experiments, with their base models, in one list.

    `rows` has the columns `experiment`, `setting`, `mode`, the metric and its interval.
    """
    ordered = rows.sort_values(metric, ascending=not higher_is_better, kind="stable").head(MOST_ROWS)
    named = ordered.assign(setting=ordered["experiment"] + ": " + ordered["setting"])
    data = _shape(named, metric, experiment="experiment")
    data["kind"] = ["base model" if mode == "base" else "setting" for mode in ordered["mode"]]
    order, legend = list(rows["experiment"].unique()), alt.Legend(orient="bottom", title=None)
    encoding: dict[str, Any] = {
        "y": alt.Y("setting:N", title=None, sort=list(data["setting"]), axis=alt.Axis(labelLimit=320)),
        "color": alt.Color("experiment:N", sort=order, scale=alt.Scale(range=list(SERIES)), legend=legend),
        "tooltip": _get_tooltip(metric),
    }
    x = alt.X("value:Q", title=metric, scale=alt.Scale(zero=False))
    kinds = alt.Scale(domain=["setting", "base model"], range=["circle", "cross"])
    shape = alt.Shape("kind:N", scale=kinds, legend=None)
    dots = alt.Chart(data).mark_point(filled=True, size=70, opacity=1)
    bars = alt.Chart(data).mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q", **encoding)
    chart = alt.layer(bars, dots.encode(x=x, shape=shape, **encoding)).properties(height=22 * len(data) + 20)
    more = f" The best {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return finish(
        f"{task}-compared", f"{metric} on {task}", f"{_tell_bars(data)} Crosses are base models.{more}", chart
    )


def draw_losses(losses: pd.DataFrame, table: pd.DataFrame, variables: Sequence[str]) -> Plot | None:
    """Draw the trainings' loss by step; `losses` has the columns `point`, `step`, `loss` and `validation_loss`."""
    if losses.empty:
        return None
    # With a single variable, each of its values is a series; otherwise, each point is.
    by_point = table.drop_duplicates("point").set_index("point")
    plotted = get_plotted_variables(by_point.reset_index(), variables)
    by = plotted[0] if len(plotted) == 1 else None
    frames = []
    curves = losses["point"].nunique()
    most = min(MOST_STEPS, max(20, MOST_DOTS // curves))
    longest = -(-int(losses.groupby("point").size().max()) // most)
    for point, rows in losses.groupby("point", sort=False):
        size = -(-len(rows) // most)
        thinned = rows.groupby((rows["step"] - 1) // size)[["step", "loss"]].mean()
        series = format_value(_plain(by_point[by][point]), by) if by and pd.notna(by_point[by][point]) else str(point)
        frames.append(thinned.assign(point=point, series=series, kind="training"))
        validated = rows.dropna(subset=["validation_loss"])
        if len(validated):
            shown = validated[["step"]].assign(loss=validated["validation_loss"])
            frames.append(shown.assign(point=point, series=series, kind="validation"))
    data = pd.concat(frames)
    has_validation = bool((data["kind"] == "validation").any())
    order = sorted(data["series"].unique(), key=_sort_key)
    scale = alt.Scale(scheme="viridis") if by or len(order) > len(SERIES) else alt.Scale(range=list(SERIES))
    colour = alt.Color("series:N", title=by or "point", sort=order, scale=scale)
    if len(order) > MOST_NAMED:
        colour = colour.legend(None)
    encoding: dict[str, Any] = {
        "x": alt.X("step:Q", title="optimizer step"),
        "y": alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        "color": colour,
        "detail": "point:N",
        "tooltip": [alt.Tooltip("point:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4f")],
    }
    training = alt.Chart().mark_line(strokeWidth=1.4, opacity=0.85).transform_filter("datum.kind == 'training'")
    layers = [training.encode(**encoding)]
    if has_validation:
        dots = alt.Chart().mark_line(point=alt.OverlayMarkDef(filled=False, size=45), strokeDash=[4, 3])
        layers.append(dots.transform_filter("datum.kind == 'validation'").encode(**encoding))
    trained = int((by_point["mode"] != "base").sum())
    caption = f"Training loss of {curves} of {trained} trainings" if curves < trained else "Training loss"
    caption += f", means of {longest} steps at most" if longest > 1 else " of each step"
    caption += ". Dashed: validation loss at the end of each epoch." if has_validation else "."
    return finish("loss", "Loss by optimizer step", caption, alt.layer(*layers, data=data))


def draw_storage(samples: pd.DataFrame) -> Plot | None:
    """Draw disk usage over time; `samples` has the columns `time`, `kept_bytes` and `temporary_bytes`."""
    if len(samples) < 2:
        return None
    # Keep the sample with the highest total of each interval.
    every = -(-len(samples) // MOST_MOMENTS)
    size_of_all = samples["kept_bytes"] + samples["temporary_bytes"]
    samples = samples.loc[size_of_all.groupby(size_of_all.reset_index().index // every).idxmax()]
    hours = (pd.to_datetime(samples["time"]) - pd.to_datetime(samples["time"]).min()).dt.total_seconds() / 3600
    unit, size = ("GB", 1e9) if (samples["kept_bytes"] + samples["temporary_bytes"]).max() >= 1e9 else ("MB", 1e6)
    data = pd.concat(
        pd.DataFrame({"hours": hours, "size": samples[f"{kind}_bytes"] / size, "kind": kind, "place": place})
        for place, kind in enumerate(("kept", "temporary"))
    )
    chart = (
        alt.Chart(data)
        .mark_area(interpolate="step-after", line=True, opacity=0.75)
        .encode(
            x=alt.X("hours:Q", title="hours since the first run began"),
            y=alt.Y("size:Q", title=f"on disk, {unit}", stack="zero"),
            color=alt.Color(
                "kind:N", title=None, scale=alt.Scale(domain=["kept", "temporary"], range=list(SERIES[:2]))
            ),
            order=alt.Order("place:Q"),
            tooltip=[alt.Tooltip("kind:N"), alt.Tooltip("hours:Q", format=".2f"), alt.Tooltip("size:Q", format=",.1f")],
        )
    )
    return finish("storage", "Storage over time", "Files that are kept, and temporary files.", chart)


def _draw_line(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    [key] = variables
    data = _shape(rows, metric, x=key)
    is_number = _are_numbers(rows[key])
    x = _get_axis(rows[key], key) if is_number else alt.X("x:N", title=key, sort=_get_order(rows[key]))
    encoding = {"x": x, "tooltip": _get_tooltip(metric)}
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    layers = _draw_base(base, metric)
    if is_number:
        layers.append(alt.Chart(data).mark_line(color=SERIES[0], strokeWidth=1.5).encode(x=x, y=y))
    seeds = points.dropna(subset=[key]) if rows["seeds"].max() > 1 else points.head(0)
    if len(seeds):
        each = _shape(seeds.assign(setting=seeds["point"]), metric, x=key)
        dots = alt.Chart(each).mark_point(color=SERIES[0], opacity=0.5, size=25)
        layers.append(dots.encode(x=x, y="value:Q", tooltip=_get_tooltip(metric)))
    layers.append(alt.Chart(data).mark_rule(color=SERIES[0], strokeWidth=2).encode(y="low:Q", y2="high:Q", **encoding))
    layers.append(alt.Chart(data).mark_point(color=SERIES[0], filled=True, size=70, opacity=1).encode(y=y, **encoding))
    caption = f"{_tell_bars(data)}{_tell_base(base)}" + (" Small circles are single trainings." if len(seeds) else "")
    return alt.layer(*layers), caption


def _draw_heat_map(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    across, down = sorted(variables, key=lambda key: -rows[key].nunique())
    data = _shape(rows, metric, x=across, y=down)
    middle = (data["value"].min() + data["value"].max()) / 2
    shared = alt.Chart(data).encode(
        x=alt.X("x:N", title=across, sort=_get_order(rows[across]), axis=alt.Axis(labelAngle=0)),
        y=alt.Y("y:N", title=down, sort=_get_order(rows[down])[::-1]),
        tooltip=_get_tooltip(metric),
    )
    cells = shared.mark_rect().encode(color=alt.Color("value:Q", title=metric, scale=alt.Scale(scheme="viridis")))
    # White text on the dark half of the scale, black text on the light half.
    ink = alt.condition(f"datum.value < {middle}", alt.value("white"), alt.value("black"))
    text = shared.mark_text(fontSize=12).encode(text=alt.Text("value:Q", format=".3f"), color=ink)
    return alt.layer(
        cells, text
    ), f"Means over samples.{_tell_base(base, metric)} Intervals are in the list below and in the table."


def _draw_multiples(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    across, series, panel = sorted(variables, key=lambda key: (-_are_numbers(rows[key]), -rows[key].nunique()))
    data = _shape(rows, metric, x=across, y=series, panel=panel)
    x = _get_axis(rows[across], across) if _are_numbers(rows[across]) else alt.X("x:N", title=across)
    order = _get_order(rows[series])
    encoding = {
        "x": x,
        "color": alt.Color("y:N", title=series, sort=order, scale=alt.Scale(range=list(SERIES))),
        "tooltip": _get_tooltip(metric),
    }
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    shape = alt.Shape("y:N", title=series, sort=order)
    dots = alt.OverlayMarkDef(filled=True, size=60, opacity=1)
    layers = [
        alt.Chart().mark_rule(strokeWidth=1.5).encode(y="low:Q", y2="high:Q", **encoding),
        alt.Chart().mark_line(strokeWidth=1.5, point=dots).encode(y=y, shape=shape, **encoding),
    ]
    if len(base):
        data["base"] = float(base.iloc[0][metric])
        layers.insert(0, alt.Chart().mark_rule(strokeDash=[5, 4]).encode(y="base:Q"))
    panels = rows[panel].nunique()
    chart = alt.layer(*layers, data=data).properties(width=max(140, WIDTH // min(panels, 3)), height=200)
    facet = alt.Facet("panel:N", title=panel, sort=_get_order(rows[panel]))
    return chart.facet(facet, columns=3), f"{_tell_bars(data)}{_tell_base(base, metric)}"


def _draw_parallel(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    lines, ticks = [], []
    for key in variables:
        order = _get_order(rows[key])
        place = {label: index / max(1, len(order) - 1) for index, label in enumerate(order)}
        ticks += [{"axis": key, "place": place[label], "label": label} for label in order]
        shaped = _shape(rows, metric, label=key)
        lines.append(shaped.assign(axis=key, place=shaped["label"].map(place)))
    data = pd.concat(lines)
    low, high = data["value"].min(), data["value"].max()
    ends = lines[0].assign(axis=metric, place=lambda d: (d["value"] - low) / ((high - low) or 1))
    data = pd.concat([data, ends])
    ticks += [{"axis": metric, "place": place, "label": f"{value:.3f}"} for place, value in ((0, low), (1, high))]
    x = alt.X(
        "axis:N",
        title=None,
        sort=[*variables, metric],
        axis=alt.Axis(labelAngle=0, grid=True),
        scale=alt.Scale(padding=0.3),
    )
    hover = alt.selection_point(name="hover", fields=["setting"], on="pointerover", empty=False)
    strokes = (
        alt.Chart(data)
        .mark_line(opacity=0.8)
        .encode(
            x=x,
            y=alt.Y("place:Q", axis=None),
            detail="setting:N",
            color=alt.Color(
                "value:Q", title=metric, scale=alt.Scale(scheme=alt.SchemeParams("viridis", extent=[0.2, 1]))
            ),
            strokeWidth=alt.condition(hover, alt.value(5), alt.value(1.8)),
            tooltip=_get_tooltip(metric),
        )
        .add_params(hover)
    )
    labels = alt.Chart(pd.DataFrame(ticks)).mark_text(align="left", dx=6, fontSize=11)
    caption = f"Each line is a setting: its values, then its metric.{_tell_base(base, metric)}"
    return alt.layer(strokes, labels.encode(x=x, y="place:Q", text="label:N")), caption


def _draw_list(rows: pd.DataFrame, base: pd.DataFrame, metric: str, ascending: bool) -> tuple[Any, str]:
    shown = rows.sort_values(metric, ascending=ascending, kind="stable").head(MOST_ROWS)
    data = _shape(shown, metric)
    y = alt.Y("setting:N", title=None, sort=list(data["setting"]), axis=alt.Axis(labelLimit=320))
    encoding = {"y": y, "tooltip": _get_tooltip(metric)}
    layers = _draw_base(base, metric, across=True)
    layers += [
        alt.Chart(data).mark_rule(color=SERIES[0], strokeWidth=2).encode(x="low:Q", x2="high:Q", **encoding),
        alt.Chart(data)
        .mark_point(color=SERIES[0], filled=True, size=60, opacity=1)
        .encode(x=alt.X("value:Q", title=metric, scale=alt.Scale(zero=False)), **encoding),
    ]
    more = f" The first {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return alt.layer(*layers).properties(height=22 * len(shown) + 20), f"{_tell_bars(data)}{_tell_base(base)}{more}"


def _draw_base(base: pd.DataFrame, metric: str, across: bool = False) -> list[alt.Chart]:
    """Return layers for the baseline: a dashed line over a band that shows its interval."""
    if base.empty:
        return []
    data = _shape(base, metric).assign(label=f"base model {base.iloc[0][metric]:.3f}")
    value, ends = ("x", ("x", "x2")) if across else ("y", ("y", "y2"))
    band = alt.Chart(data).mark_rect(opacity=0.12, color="#888888")
    line = alt.Chart(data).mark_rule(strokeDash=[5, 4], strokeWidth=1.5)
    place: Any = (
        {"align": "left", "dx": 4, "dy": 8, "baseline": "top"} if across else {"align": "right", "dx": -4, "dy": -7}
    )
    text = alt.Chart(data).mark_text(fontSize=12, **place)
    edge = {"y": alt.value(0)} if across else {"x": alt.value("width")}
    drawn = [line.encode(**{value: "value:Q"}), text.encode(**{value: "value:Q"}, **edge, text="label:N")]
    if data["low"].notna().all():
        drawn.insert(0, band.encode(**{ends[0]: "low:Q", ends[1]: "high:Q"}))
    return drawn


def _shape(rows: pd.DataFrame, metric: str, **places: str) -> pd.DataFrame:
    """Return a plot's data: `setting`, `value`, `low`, `high`, `seeds`, and a column for each place in `places`."""
    shaped = pd.DataFrame({"setting": rows["setting"].astype(str), "value": rows[metric].astype(float)})
    for side in ("low", "high"):
        column = rows.get(f"{metric}:{side}")
        shaped[side] = float("nan") if column is None else pd.to_numeric(column, errors="coerce").astype(float)
    shaped["seeds"] = rows.get("seeds", 1)
    for place, key in places.items():
        values = [_plain(value) for value in rows[key]]
        is_scaled = place == "x" and _are_numbers(rows[key]) and len(places) in (1, 3)
        shaped[place] = values if is_scaled else [format_value(value, key) for value in values]
    return shaped.reset_index(drop=True)


def _get_axis(values: "pd.Series[Any]", title: str) -> alt.X:
    """Return a numeric axis with a tick at each value; logarithmic if the values span a factor of 8 or more."""
    numbers = sorted({float(value) for value in values})
    is_log = numbers[0] > 0 and numbers[-1] / numbers[0] >= 8
    scale = alt.Scale(type="log", nice=False, padding=20) if is_log else alt.Scale(zero=False, nice=False, padding=20)
    labels = {number: format_value(_plain(number), title) for number in numbers}
    return alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=numbers, labelExpr=_spell(labels), grid=True))


def _spell(labels: Mapping[float, str]) -> str:
    """Return a Vega expression that labels each value as in the points' names."""
    tests = [f"abs(datum.value - {number!r}) < {abs(number) * 1e-9!r} ? '{text}' : " for number, text in labels.items()]
    return "".join(tests) + "datum.label"


def _get_order(values: "pd.Series[Any]") -> list[str]:
    return [format_value(value, str(values.name)) for value in sorted({_plain(v) for v in values}, key=_sort_key)]


def _sort_key(value: Any) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except (TypeError, ValueError):
        return (1, 0.0, str(value))


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(_plain(value), int | float) and not isinstance(value, bool) for value in values)


def _plain(value: Any) -> Any:
    """Return a value of a data frame as a Python value; floats that are whole numbers become int."""
    plain = value.item() if hasattr(value, "item") else value
    return int(plain) if isinstance(plain, float) and plain.is_integer() and abs(plain) < 1e15 else plain


def _get_tooltip(metric: str) -> list[alt.Tooltip]:
    number = [
        alt.Tooltip(f"{key}:Q", format=".4f", title=title)
        for key, title in (("value", metric), ("low", "low"), ("high", "high"))
    ]
    return [alt.Tooltip("setting:N"), *number]


def _tell_bars(data: pd.DataFrame) -> str:
    return "Bars are confidence intervals." if data["low"].notna().any() else "This metric has no intervals here."


def _tell_base(base: pd.DataFrame, metric: str | None = None) -> str:
    if base.empty:
        return ""
    return f" Base model: {base.iloc[0][metric]:.3f}." if metric else " Dashed: the base model, with its interval."
