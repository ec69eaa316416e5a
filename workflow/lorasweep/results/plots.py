"""The plots of a sweep, as Vega-Lite specifications for both the picture files and the interactive report.

The kind of plot depends on the number of variables. All plots are readable in grey: cells show their values, series
have different shapes, and colour scales run from dark to light.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from lorasweep.experiment.points import format_value
from lorasweep.layout import is_base
from lorasweep.results.labels import get_differing, get_trained, label_points, label_settings, plain, shorten
from lorasweep.util.formats import format_score, get_unit
from lorasweep.util.vega import SERIES, WIDTH, Plot, finish

MOST_ROWS = 20
"""Maximum number of settings in a list. Of more settings, the best are shown."""

MOST_NAMED = 12
"""Maximum number of entries of a legend. Of more loss curves, colours show one variable; a tooltip names each curve."""

MOST_STEPS, MOST_DOTS = 400, 40_000
"""Maximum number of points of one loss curve, and of all curves. Steps are averaged to stay below."""

_FOLDED = alt.Axis(labelAngle=0, labelExpr="split(datum.label, '\\n')")
"""An axis of labels that `_fold` broke into lines."""

MOST_MOMENTS = 1000
"""Maximum number of points of a storage curve."""

alt.data_transformers.disable_max_rows()  # the limits above bound the data


def get_plotted_variables(settings: pd.DataFrame, variables: Sequence[str]) -> list[str]:
    """Return the variables that differ between settings, except `seed`, which distinguishes replicates."""
    return get_differing(settings, [key for key in variables if key != "seed"])


def draw_metric(
    settings: pd.DataFrame,
    points: pd.DataFrame,
    variables: Sequence[str],
    task: str,
    metric: str,
    higher_is_better: bool = True,
) -> list[Plot]:
    """Draw a metric on a task: by the variables, and for two or more of them, as a list of the settings.

    `settings` is the table from `replicates.aggregate`, `points` the table of points.
    """
    points = points[(points["task"] == task) & points[metric].notna()]
    settings = settings[(settings["task"] == task) & settings[metric].notna()]
    rows = settings[settings["mode"] != "base"]
    if rows.empty:
        return []
    labels = label_settings(points, variables)
    # Of several base models, none is the line to which all settings compare: they are in the list.
    is_line = settings["setting"].map(is_base)
    is_line &= is_line.sum() == 1
    base, listed = (
        part.assign(setting=part["setting"].map(labels)) for part in (settings[is_line], settings[~is_line])
    )
    points = points.assign(setting=points["point"].map(label_points(points, variables)))
    rows = listed[listed["mode"] != "base"]
    plotted = get_plotted_variables(rows, variables)
    grid = get_trained(rows) if plotted else rows.head(0)
    drawn = []
    if len(grid) > 1:
        draw: Any = {1: _draw_line, 2: _draw_heat_map, 3: _draw_multiples}.get(len(plotted), _draw_effects)
        chart, caption = draw(grid, points, base, plotted, metric)
        if without := len(rows) - len(grid):
            caption += f" Only in the table: {without} settings that are not trained."
        drawn.append(finish(f"{task}-by-{'-'.join(plotted[:3])}", f"{metric} on {task}", caption, chart))
    if len(plotted) != 1 or len(listed) > len(grid):
        chart, caption = _draw_list(listed, points, base, metric, not higher_is_better)
        drawn.append(finish(f"{task}-settings", f"{metric} on {task}, each setting", caption, chart))
    return drawn


def draw_comparison(rows: pd.DataFrame, task: str, metric: str, higher_is_better: bool = True) -> Plot:
    """Draw a metric of the settings of several experiments, with their base models, in one list.

    `rows` has the columns `experiment`, `setting`, `mode`, the metric and its interval.
    """
    ordered = rows.sort_values(metric, ascending=not higher_is_better, kind="stable").head(MOST_ROWS)
    named = ordered.assign(setting=ordered["experiment"] + ": " + ordered["setting"])
    shaped = _shape(named, metric, experiment="experiment")
    [data] = _clip([shaped], shaped.head(0))
    data["kind"] = ["base model" if mode == "base" else "setting" for mode in ordered["mode"]]
    order, legend = list(rows["experiment"].unique()), alt.Legend(orient="bottom", title=None)
    encoding: dict[str, Any] = {
        "y": alt.Y("setting:N", title=None, sort=list(data["setting"])),
        "color": alt.Color("experiment:N", sort=order, scale=alt.Scale(range=list(SERIES)), legend=legend),
        "tooltip": _get_tooltip(metric),
    }
    x = alt.X("value:Q", title=metric, scale=alt.Scale(zero=False))
    kinds = alt.Scale(domain=["setting", "base model"], range=["circle", "cross"])
    shape = alt.Shape("kind:N", scale=kinds, legend=None)
    dots = alt.Chart(data).mark_point(filled=True, size=70, opacity=1).encode(x=x, shape=shape, **encoding)
    chart = _fit_list(alt.layer(*_draw_intervals(alt.Chart(data), data, encoding, across=True), dots), data)
    more = f" The best {MOST_ROWS} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return finish(
        f"{task}-compared", f"{metric} on {task}", f"{_tell_bars(data)} Crosses are base models.{more}", chart
    )


def draw_losses(losses: pd.DataFrame, table: pd.DataFrame, variables: Sequence[str]) -> Plot | None:
    """Draw the trainings' loss by step; `losses` has the columns `point`, `step`, `loss` and `validation_loss`."""
    if losses.empty:
        return None
    by_point = table.drop_duplicates("point").set_index("point")
    curves = losses["point"].nunique()
    labels = label_points(table, variables)
    by = _choose_colour(losses, by_point, get_plotted_variables(table, variables), curves)
    values = {
        point: plain(by_point[by][point]) if by else labels[point] for point in map(str, losses["point"].unique())
    }
    texts = shorten(values.values(), by) if by else {label: label for label in values.values()}
    is_scale = bool(by) and len(texts) > MOST_NAMED and _are_numbers(values.values())
    frames = []
    most = min(MOST_STEPS, max(20, MOST_DOTS // curves))
    longest = -(-int(losses.groupby("point").size().max()) // most)
    for point, rows in losses.groupby("point", sort=False):
        size = -(-len(rows) // most)
        thinned = rows.groupby((rows["step"] - 1) // size)[["step", "loss"]].mean()
        value = values[str(point)]
        series = value if is_scale else texts[format_value(value, by)]
        shown = {"point": labels[str(point)], "series": series}
        frames.append(thinned.assign(**shown, kind="training"))
        validated = rows.dropna(subset=["validation_loss"])
        if len(validated):
            frames.append(validated[["step"]].assign(loss=validated["validation_loss"], **shown, kind="validation"))
    data = pd.concat(frames)
    has_validation = bool((data["kind"] == "validation").any())
    encoding: dict[str, Any] = {
        "x": alt.X("step:Q", title="optimizer step", scale=alt.Scale(nice=False)),
        "y": alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        "color": _get_colour(list(values.values()), by, is_scale, texts),
        "detail": "point:N",
        "tooltip": [alt.Tooltip("point:N"), alt.Tooltip("step:Q"), alt.Tooltip("loss:Q", format=".4f")],
    }
    is_short = bool(data["step"].max() < 3)
    training = alt.Chart().mark_line(strokeWidth=1.4, opacity=0.85, point=is_short)
    layers = [training.transform_filter("datum.kind == 'training'").encode(**encoding)]
    if has_validation:
        dots = alt.Chart().mark_line(point=alt.OverlayMarkDef(filled=False, size=45), strokeDash=[4, 3])
        layers.append(dots.transform_filter("datum.kind == 'validation'").encode(**encoding))
    trained = int((by_point["mode"] != "base").sum())
    caption = f"Training loss of {curves} of {trained} trainings" if curves < trained else "Training loss"
    caption += f", means of {longest} steps at most" if longest > 1 else " of each step"
    caption += ". Dashed: validation loss at the end of each epoch." if has_validation else "."
    width = 90 + 7 * min(80, max(len(str(text)) for text in texts.values()))
    chart = alt.layer(*layers, data=data).properties(usermeta={"width": width})
    return finish("loss", "Loss by optimizer step", caption, chart)


def _choose_colour(losses: pd.DataFrame, by_point: pd.DataFrame, plotted: Sequence[str], curves: int) -> str | None:
    """Return the variable that colours loss curves: the only one, or of many curves' that which separates them most.

    That is the one with the highest adjusted R² of the last losses. `None`: each curve has its own colour.
    """
    if len(plotted) == 1:
        return plotted[0]
    if curves <= MOST_NAMED or not plotted:
        return None
    last = losses.groupby("point")["loss"].last()
    total = float(((last - last.mean()) ** 2).sum())
    explained = {}
    for key in plotted:
        groups = last.groupby([format_value(plain(by_point[key][point]), key) for point in last.index])
        if groups.ngroups <= MOST_NAMED and total:
            within = float(((last - groups.transform("mean")) ** 2).sum())
            explained[key] = 1 - within / total * (len(last) - 1) / (len(last) - groups.ngroups)
    numbers = [key for key in plotted if _are_numbers(by_point[key])]
    return max(explained, key=lambda key: explained[key]) if explained else next(iter(numbers), None)


def _get_colour(values: Sequence[Any], by: str | None, is_scale: bool, texts: Mapping[str, str]) -> alt.Color:
    """Return the colours of loss curves: a scale for many numbers, shades for ordered values, or one for each."""
    if is_scale:
        is_log = min(values) > 0 and max(values) / min(values) >= 8
        return alt.Color("series:Q", title=by, scale=alt.Scale(type="log" if is_log else "linear"))
    order = [texts[format_value(value, by)] for value in sorted(dict.fromkeys(values), key=_sort_key)]
    legend = _get_legend(order)
    if len(order) > MOST_NAMED:
        return alt.Color("series:O", sort=order, legend=None)
    if (by and _are_numbers(values)) or len(order) > len(SERIES):
        return alt.Color("series:O", title=by or "training", sort=order, legend=legend)
    return alt.Color("series:N", title=by or "training", sort=order, legend=legend, scale=alt.Scale(range=list(SERIES)))


def _get_legend(labels: Sequence[str]) -> alt.Legend:
    """Return a legend below the plot, with as many columns as its labels leave room for."""
    widest = 7 * max(map(len, labels)) + 40
    return alt.Legend(orient="bottom", columns=alt.ExprRef(f"max(1, floor(width / {widest}))"), labelLimit=560)


def draw_storage(samples: pd.DataFrame) -> Plot | None:
    """Draw disk usage over time; `samples` has the columns `time`, `kept_bytes` and `temporary_bytes`."""
    if len(samples) < 2:
        return None
    # Keep the sample with the highest total of each interval.
    every = -(-len(samples) // MOST_MOMENTS)
    size_of_all = samples["kept_bytes"] + samples["temporary_bytes"]
    samples = samples.loc[size_of_all.groupby(size_of_all.reset_index().index // every).idxmax()]
    hours = (pd.to_datetime(samples["time"]) - pd.to_datetime(samples["time"]).min()).dt.total_seconds() / 3600
    unit, size = get_unit((samples["kept_bytes"] + samples["temporary_bytes"]).max())
    data = pd.concat(
        pd.DataFrame({"hours": hours, "size": samples[f"{kind}_bytes"] / size, "kind": kind, "place": place})
        for place, kind in enumerate(("kept", "temporary"))
    )
    chart = (
        alt.Chart(data)
        .mark_area(interpolate="step-after", line=True, opacity=0.75)
        .encode(
            x=alt.X("hours:Q", title="hours since the first run began", scale=alt.Scale(nice=False)),
            y=alt.Y("size:Q", title=f"on disk, {unit}", stack="zero"),
            color=alt.Color(
                "kind:N",
                title=None,
                scale=alt.Scale(domain=["kept", "temporary"], range=list(SERIES[:2])),
                legend=alt.Legend(orient="bottom"),
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
    own = points["point"].isin(";".join(rows["points"]).split(";"))
    each = _shape(points[own] if rows["seeds"].max() > 1 else points.head(0), metric, x=key)
    data, ground = _clip([_shape(rows, metric, x=key), _shape(base, metric)], each)
    is_number = _are_numbers(rows[key])
    x = _get_axis(rows[key], key) if is_number else _get_words(rows[key], key)
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    layers = _draw_base(ground)
    if is_number:
        layers.append(alt.Chart(data).mark_line(color=SERIES[0], strokeWidth=1.5).encode(x=x, y=y))
    if len(each):
        dots = alt.Chart(each).mark_point(color=SERIES[0], opacity=0.5, size=25)
        layers.append(dots.encode(x=x, y="value:Q", tooltip=_get_tooltip(metric)))
    encoding = {"x": x, "tooltip": _get_tooltip(metric)}
    layers += _draw_intervals(alt.Chart(data), data, encoding, color=SERIES[0])
    layers.append(alt.Chart(data).mark_point(color=SERIES[0], filled=True, size=70, opacity=1).encode(y=y, **encoding))
    caption = f"{_tell_bars(data)}{_tell_base(base, metric)}"
    return alt.layer(*layers), caption + (" Small circles are single trainings." if len(each) else "")


def _draw_heat_map(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    # Long texts stand at the rows, where there is more room; else the variable with more values is the wider side.
    across, down = sorted(variables, key=lambda key: (_get_longest(rows, key) > 15, -rows[key].nunique()))
    data = _shape(rows, metric, x=across, y=down)
    middle = (data["value"].min() + data["value"].max()) / 2
    shared = alt.Chart(data).encode(
        x=_get_words(rows[across], across),
        y=alt.Y("y:N", title=down, sort=[_fold(text) for text in _get_order(rows[down])[::-1]], axis=_FOLDED),
        tooltip=_get_tooltip(metric),
    )
    cells = shared.mark_rect().encode(color=alt.Color("value:Q", scale=alt.Scale(scheme="viridis"), legend=None))
    # White text on the dark half of the scale, black text on the light half.
    ink = alt.condition(f"datum.value < {middle}", alt.value("white"), alt.value("black"))
    text = shared.mark_text(fontSize=12).encode(text=alt.Text("value:Q", format=".3f"), color=ink)
    widest = max(map(len, "\n".join(data["x"]).split("\n")))
    chart = alt.layer(cells, text).properties(usermeta={"width": 160 + data["x"].nunique() * max(55, 7 * widest)})
    return chart, f"Means over samples.{_tell_base(base, metric, 'Base model: ')} The list has their intervals."


def _draw_multiples(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    across, series, panel = sorted(variables, key=lambda key: (-_are_numbers(rows[key]), -rows[key].nunique()))
    ground, trainings = _shape(base, metric), _shape(points, metric)
    [data, _] = _clip([_shape(rows, metric, x=across, series=series, panel=panel), ground], trainings)
    x = _get_axis(rows[across], across) if _are_numbers(rows[across]) else _get_words(rows[across], across)
    order = _get_order(rows[series])
    colours = {"range": list(SERIES)} if len(order) <= len(SERIES) else {"scheme": "viridis"}
    # Legends are merged only if their scales have the same domain.
    shared: dict[str, Any] = {"title": series, "legend": alt.Legend(orient="bottom", columns=len(order))}
    encoding = {
        "x": x,
        "color": alt.Color("series:N", scale=alt.Scale(domain=order, **colours), **shared),
        "tooltip": _get_tooltip(metric),
    }
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    shape = alt.Shape("series:N", scale=alt.Scale(domain=order), **shared)
    layers = _draw_intervals(alt.Chart(), data, encoding)
    layers.append(alt.Chart().mark_line(strokeWidth=1.5).encode(y=y, **encoding))
    layers.append(alt.Chart().mark_point(filled=True, size=60, opacity=1).encode(y=y, shape=shape, **encoding))
    if len(base):
        data["base"] = float(base.iloc[0][metric])
        layers.insert(0, alt.Chart().mark_rule(strokeDash=[5, 4]).encode(y="base:Q"))
    panels = rows[panel].nunique()
    chart = alt.layer(*layers, data=data).properties(width=max(140, WIDTH // min(panels, 3)), height=200)
    facet = alt.Facet("panel:N", title=panel, sort=_get_order(rows[panel]))
    return chart.facet(facet, columns=3), f"{_tell_bars(data)}{_tell_base(base, metric)}"


def _draw_effects(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, variables: Sequence[str], metric: str
) -> tuple[Any, str]:
    panels = []
    for key in variables:
        data = _shape(rows, metric, x=key)
        is_number = _are_numbers(rows[key])
        x = _get_axis(rows[key], key) if is_number else _get_words(rows[key], key)
        y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
        dots = alt.Chart(data).mark_point(color=SERIES[0], opacity=0.5, size=25)
        means = alt.Chart(data).mark_line(color=SERIES[1], point=alt.OverlayMarkDef(color=SERIES[1], size=60))
        layers = [dots.encode(x=x, y=y, tooltip=_get_tooltip(metric))]
        if data["x"].nunique() <= MOST_NAMED:
            layers.append(means.encode(x=x, y=alt.Y("mean(value):Q", title=metric)))
        panels.append(alt.layer(*layers).properties(width=WIDTH // 3, height=180))
    caption = f"Each circle is a setting; the line is their mean.{_tell_base(base, metric, 'Base model: ')}"
    return alt.concat(*panels, columns=3, usermeta={"width": 800}).resolve_scale(y="shared"), caption


def _draw_list(
    rows: pd.DataFrame, points: pd.DataFrame, base: pd.DataFrame, metric: str, ascending: bool
) -> tuple[Any, str]:
    shown = rows.sort_values(metric, ascending=ascending, kind="stable").head(MOST_ROWS)
    data, ground = _clip([_shape(shown, metric), _shape(base, metric)], _shape(points, metric))
    y = alt.Y("setting:N", title=None, sort=list(data["setting"]))
    encoding = {"y": y, "tooltip": _get_tooltip(metric)}
    layers = _draw_base(ground, across=True)
    layers += _draw_intervals(alt.Chart(data), data, encoding, across=True, color=SERIES[0])
    layers.append(
        alt.Chart(data)
        .mark_point(color=SERIES[0], filled=True, size=60, opacity=1)
        .encode(x=alt.X("value:Q", title=metric, scale=alt.Scale(zero=False)), **encoding)
    )
    best = "lowest" if ascending else "highest"
    more = f" The {MOST_ROWS} {best} of {len(rows)}." if len(rows) > MOST_ROWS else ""
    return _fit_list(alt.layer(*layers), data), f"{_tell_bars(data)}{_tell_base(base, metric)}{more}"


def _fit_list(chart: Any, data: pd.DataFrame) -> Any:
    """Return the chart of a list with room for its rows and for their names."""
    width = 200 + 7 * min(80, max(map(len, data["setting"])))
    return chart.properties(height=22 * len(data) + 20, usermeta={"width": width})


def _draw_base(data: pd.DataFrame, across: bool = False) -> list[alt.Chart]:
    """Return layers for the baseline: a dashed line over a band that shows its interval."""
    if data.empty:
        return []
    value, ends = ("x", ("x", "x2")) if across else ("y", ("y", "y2"))
    drawn = [alt.Chart(data).mark_rule(strokeDash=[5, 4], strokeWidth=1.5).encode(**{value: "value:Q"})]
    if data["low"].notna().all():
        band = alt.Chart(data).mark_rect(opacity=0.15, color="#888888")
        drawn.insert(0, band.encode(**{ends[0]: "low:Q", ends[1]: "high:Q"}))
    return drawn


def _draw_intervals(
    chart: alt.Chart, data: pd.DataFrame, encoding: Mapping[str, Any], across: bool = False, **mark: Any
) -> list[alt.Chart]:
    """Return layers for the intervals: a bar each, with an arrow where `_clip` has cut it."""
    value, ends = ("x", ("left", "right")) if across else ("y", ("down", "up"))
    bars = {value: "low:Q", f"{value}2": "high:Q"}
    layers = [chart.mark_rule(strokeWidth=2, **mark).encode(**bars, **encoding)] if data["low"].notna().any() else []
    for side, end in zip(("low", "high"), ends, strict=True):
        if data[f"is_{side}_cut"].any():
            arrow = chart.transform_filter(f"datum.is_{side}_cut").mark_point(
                shape=f"triangle-{end}", filled=True, size=70, opacity=1, **mark
            )
            layers.append(arrow.encode(**{value: f"{side}:Q"}, **encoding))
    return layers


def _clip(frames: Sequence[pd.DataFrame], trainings: pd.DataFrame) -> list[pd.DataFrame]:
    """Return the data of a plot with intervals that leave room for the values: `low`, `high`, `is_low_cut` and so on.

    At each side of the values, the plot has their range at most, or three times the shortest arm of an interval of a
    single training: intervals over few seeds can be of any length. If all values are within 0 and 1, so is the plot.
    """
    every = pd.concat([*frames, trainings])
    single = every[every["seeds"] <= 1]
    arms = pd.concat([single["value"] - single["low"], single["high"] - single["value"]])
    least, most = every["value"].min(), every["value"].max()
    room = max(most - least, 3 * arms[arms > 0].min() if (arms > 0).any() else 0.0)
    is_share = least >= 0 and most <= 1
    bounds = {
        "low": max(least - room, 0) if is_share else least - room,
        "high": min(most + room, 1) if is_share else most + room,
    }
    clipped = []
    for frame in frames:
        is_cut = {"low": frame["low"] < bounds["low"], "high": frame["high"] > bounds["high"]}
        cut = {side: frame[side].mask(is_cut[side], bounds[side]) for side in bounds}
        whole = {f"whole_{side}": frame[side] for side in bounds}
        clipped.append(frame.assign(**whole, **cut, **{f"is_{side}_cut": is_cut[side] for side in bounds}))
    return clipped


def _shape(rows: pd.DataFrame, metric: str, **places: str) -> pd.DataFrame:
    """Return a plot's data: `setting`, `value`, `low`, `high`, `seeds`, and a column for each place in `places`.

    The ends of the intervals are also in `whole_low` and `whole_high`, which `_clip` leaves as they are.
    """
    shaped = pd.DataFrame({"setting": rows["setting"].astype(str), "value": rows[metric].astype(float)})
    for side in ("low", "high"):
        column = rows.get(f"{metric}:{side}")
        shaped[side] = float("nan") if column is None else pd.to_numeric(column, errors="coerce").astype(float)
        shaped[f"whole_{side}"] = shaped[side]
    shaped["seeds"] = rows.get("seeds", 1)
    for place, key in places.items():
        is_scaled = place == "x" and _are_numbers(rows[key]) and len(places) in (1, 3)
        values, short = [plain(value) for value in rows[key]], shorten(rows[key], key)
        texts = [short[format_value(value, key)] for value in values]
        shaped[place] = values if is_scaled else [_fold(text, place) if place in ("x", "y") else text for text in texts]
    return shaped.reset_index(drop=True)


def _get_words(values: "pd.Series[Any]", title: str) -> alt.X:
    """Return an axis with a text at each place, in lines if it is long."""
    return alt.X("x:N", title=title, sort=[_fold(text, "x") for text in _get_order(values)], axis=_FOLDED)


def _fold(text: str, place: str = "y") -> str:
    return textwrap.fill(text, {"x": 13, "y": 24}[place], break_long_words=False)


def _get_axis(values: "pd.Series[Any]", title: str) -> alt.X:
    """Return a numeric axis with a tick at each value; logarithmic if the values span a factor of 8 or more."""
    numbers = sorted({float(value) for value in values})
    is_log = numbers[0] > 0 and numbers[-1] / numbers[0] >= 8
    scale = alt.Scale(type="log", nice=False, padding=20) if is_log else alt.Scale(zero=False, nice=False, padding=20)
    labels = {number: format_value(plain(number), title) for number in numbers}
    return alt.X("x:Q", title=title, scale=scale, axis=alt.Axis(values=numbers, labelExpr=_spell(labels), grid=True))


def _spell(labels: Mapping[float, str]) -> str:
    """Return a Vega expression that labels each value as in the points' names."""
    tests = [f"abs(datum.value - {number!r}) < {abs(number) * 1e-9!r} ? '{text}' : " for number, text in labels.items()]
    return "".join(tests) + "datum.label"


def _get_order(values: "pd.Series[Any]") -> list[str]:
    key = str(values.name)
    short = shorten(values, key)
    return [short[format_value(value, key)] for value in sorted({plain(v) for v in values}, key=_sort_key)]


def _get_longest(rows: pd.DataFrame, key: str) -> int:
    return max(map(len, shorten(rows[key], key).values()))


def _sort_key(value: Any) -> tuple[int, float, str]:
    try:
        return (0, float(value), "")
    except (TypeError, ValueError):
        return (1, 0.0, str(value))


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(plain(value), int | float) and not isinstance(value, bool) for value in values)


def _get_tooltip(metric: str) -> list[alt.Tooltip]:
    number = [
        alt.Tooltip(f"{key}:Q", format=".4f", title=title)
        for key, title in (("value", metric), ("whole_low", "low"), ("whole_high", "high"))
    ]
    return [alt.Tooltip("setting:N"), *number]


def _tell_bars(data: pd.DataFrame) -> str:
    if not data["low"].notna().any():
        return "This metric has no intervals here."
    is_cut = data[["is_low_cut", "is_high_cut"]].any(axis=None)
    return "Bars are confidence intervals." + (" An arrow: the interval goes on beyond the plot." if is_cut else "")


def _tell_base(base: pd.DataFrame, metric: str, name: str = "Dashed: the base model, ") -> str:
    return f" {name}{format_score(base.iloc[0][metric])}." if len(base) else ""
