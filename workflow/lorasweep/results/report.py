"""The report: one offline page with the answer, the plots, and the provenance of each number.

Snakemake's own report is not used: it is about the workflow's files, needs a network to be made, and has no place for
an answer to the question.
"""

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lorasweep.experiment.points import format_value
from lorasweep.experiment.sections import MODE_KEY, Experiment
from lorasweep.layout import BASELINE, EXPERIMENT, FAILURE_RECORD, STORAGE, TRAINING_LOG
from lorasweep.results.plots import draw_losses, draw_metric, draw_storage
from lorasweep.results.table import is_metric
from lorasweep.util.files import read_tail
from lorasweep.util.vega import Plot, get_theme, write_pictures

_TEXTS = {"setting": str, "task": str, "points": str}
"""Columns whose values are read as text, even if they look like numbers."""

_TEMPLATES = Path(__file__).parents[2] / "report"

_LOG_LINES = 12
"""Number of log lines shown with a failure."""

_LOGS_IN_PAGE = 300
"""Maximum number of points whose loss is drawn. Of more points, an evenly spaced selection is drawn."""


@dataclass(frozen=True)
class _Column:
    """A column of the report's table."""

    title: str
    source: str
    digits: int | None = None
    scale: float = 1.0


def make_report(table_file: Path, pipeline: Sequence[Mapping[str, Any]], page: Path, plots: Path) -> None:
    """Write the report and the plots of an experiment, given its table of points.

    The table's folder must hold its companions (`replicates.csv`, `answer.json`) and `experiment.yaml`. It may hold
    other files of a run: `failures.json`, `ledger.csv` and `storage.csv`. `pipeline` are the stages of
    `lorasweep.stages` as plain values.
    """
    results = table_file.parent
    is_partial = table_file.stem.endswith("-partial")
    companions = {
        name: table_file.with_name(table_file.name.replace("results", name)) for name in ("replicates", "answer")
    }
    table = pd.read_parquet(table_file.with_suffix(".parquet"))
    settings = pd.read_csv(companions["replicates"], dtype=_TEXTS, keep_default_na=False, na_values=[""])
    answer = json.loads(companions["answer"].with_suffix(".json").read_text(encoding="utf-8"))
    configuration = yaml.safe_load((results / EXPERIMENT).read_text(encoding="utf-8"))
    experiment = Experiment.model_validate(configuration)
    variables = answer["variables"]
    drawn = _draw(results, table, settings, variables, answer, experiment.report.higher_is_better)
    write_pictures(drawn, plots)
    # The complete report is made only if no job failed; a failure record is then that of an earlier run.
    has_failures = is_partial and (results / FAILURE_RECORD).is_file()
    failures = json.loads((results / FAILURE_RECORD).read_text(encoding="utf-8")) if has_failures else []
    text = render(
        "report.html.jinja",
        drawn,
        name=experiment.experiment.name,
        question=experiment.experiment.question,
        answer=answer,
        is_partial=is_partial,
        made=datetime.now(UTC).isoformat(timespec="minutes"),
        facts=_get_facts(results, table, failures),
        table=Markup(_make_table(results, table, variables)),
        failures=[
            {**failure, "tail": "\n".join(read_tail(Path(failure["log"]))[-_LOG_LINES:])} for failure in failures
        ],
        results=results.as_posix(),
        differences=_find_differences(experiment),
        configuration=yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True, width=100),
        versions=_get_versions(table),
        revisions=sorted(set(table["git_revision"].dropna())),
        columns=_lay_out(pipeline),
        has_baseline=bool((table["point"] == BASELINE).any()),
        confidence=experiment.report.confidence,
        files=[(results / name).name for name in _list_files(table_file, companions)],
    )
    page.write_text(text, encoding="utf-8")


def render(template: str, plots: Sequence[Plot], **values: Any) -> str:
    """Return a page from a template in `workflow/report`, with the scripts that draw its plots."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(
        plots=plots,
        specs=_as_script({plot.name: plot.spec for plot in plots}),
        themes=_as_script({theme: get_theme(theme, is_transparent=True) for theme in ("light", "dark")}),
        vega=Markup(_get_vega()),
        **values,
    )


def _draw(
    results: Path,
    table: pd.DataFrame,
    settings: pd.DataFrame,
    variables: Sequence[str],
    answer: Mapping[str, Any],
    higher_is_better: bool,
) -> list[Plot]:
    """Draw the deciding metric, the first metric of each other task, the losses and the storage, in this order."""
    drawn: list[Plot] = []
    order = list(table["point"].unique())
    tasks = sorted(table["task"].dropna().unique(), key=lambda task: task != answer["task"])
    for task in tasks:
        metrics = [c for c in table.columns if is_metric(c) and table.loc[table["task"] == task, c].notna().any()]
        metric = answer["metric"] if task == answer["task"] else next(iter(metrics), None)
        if metric:
            drawn += draw_metric(settings, table, variables, task, metric, higher_is_better)
    # The log of an earlier epoch is the beginning of the last epoch's log, so only that one is drawn.
    trained = table.dropna(subset="recipe").sort_values("steps").drop_duplicates("recipe_sha256", keep="last")
    losses = draw_losses(_read_losses(results, sorted(trained["point"], key=order.index)), trained, variables)
    storage = results / STORAGE
    stored = draw_storage(pd.read_csv(storage)) if storage.is_file() else None
    return [*drawn, *(plot for plot in (losses, stored) if plot)]


def _read_losses(results: Path, points: Sequence[str]) -> pd.DataFrame:
    files = {point: results / point / "adapter" / TRAINING_LOG for point in points}
    logs = [(point, file) for point, file in files.items() if file.is_file()]
    selected = logs[:: max(1, -(-len(logs) // _LOGS_IN_PAGE))]
    frames = [pd.read_csv(file).assign(point=point) for point, file in selected]
    columns = ["point", "step", "loss", "validation_loss"]
    return pd.concat(frames)[columns].dropna(subset=["loss"]) if frames else pd.DataFrame(columns=columns)


def _get_facts(results: Path, table: pd.DataFrame, failures: Sequence[Any]) -> list[tuple[str, str]]:
    points = table[table["mode"] != "base"]["point"].nunique()
    once = table.drop_duplicates("point")
    kept = once["bytes"].sum()
    facts = [("points", f"{points}"), ("failed", f"{len(failures)}"), ("kept on disk", f"{kept / 1e6:,.0f} MB")]
    ledger = results / "ledger.csv"
    if ledger.is_file() and len(rows := pd.read_csv(ledger)):
        total = rows.iloc[-1]
        if total["full_model_bytes"] > kept:
            facts.append(("full models would keep", f"{total['full_model_bytes'] / 1e9:,.1f} GB"))
    hours = once[[column for column in once.columns if column.endswith("_seconds")]].sum().sum() / 3600
    facts.append(("job hours", f"{hours:,.2f}"))
    if once["gpu_hours"].sum():
        facts.append(("GPU hours", f"{once['gpu_hours'].sum():,.2f}"))
    return facts


def _make_table(results: Path, table: pd.DataFrame, variables: Sequence[str]) -> str:
    """Return the rows as an HTML table that sorts and filters, by itables (DataTables), with inlined scripts."""
    columns = [_Column(key, key) for key in variables if key != MODE_KEY] + [
        _Column("task", "task"),
        _Column("samples", "samples"),
    ]
    for metric in filter(is_metric, table.columns):
        columns += [
            _Column(metric, metric, 3),
            _Column("low", f"{metric}:low", 3),
            _Column("high", f"{metric}:high", 3),
        ]
        columns.append(_Column("over base", f"{metric}:delta", 3))
        columns += [_Column(side, f"{metric}:delta_{side}", 3) for side in ("low", "high")]
        columns.append(_Column("p, corrected", f"{metric}:p_adjusted", 4))
    columns += [_Column("train loss", "final_train_loss", 3), _Column("validation loss", "final_validation_loss", 3)]
    columns += [_Column("mode", "mode"), _Column("MB", "bytes", 1, 1e-6), _Column("GPU h", "gpu_hours", 2)]
    shown: dict[tuple[str, int], list[Any]] = {("point", 0): [_link(point, point) for point in table["point"]]}
    logs = [Path(log).relative_to(results).as_posix() if pd.notna(log) else None for log in table["log"]]
    shown["log", 1] = [_link(log, "log") if log else "" for log in logs]
    for place, column in enumerate(columns, 2):
        if column.source in table and table[column.source].notna().any():
            values = table[column.source]
            if column.digits is not None:
                values = (pd.to_numeric(values) * column.scale).round(column.digits)
            shown[column.title, place] = [_escape(value) for value in values]
    adapters = [str(value)[:12] if pd.notna(value) else "" for value in table["adapter_sha256"]]
    shown["adapter", len(columns) + 2] = adapters
    frame = pd.DataFrame({place: values for (_, place), values in shown.items()})
    frame.columns = pd.Index([html.escape(title) for title, _ in shown])
    return get_table_scripts() + make_sortable(frame, "results")


def get_table_scripts() -> str:
    """Return what a page with tables of `make_sortable` needs once, as HTML."""
    from itables import options
    from itables.javascript import generate_init_offline_itables_html

    return _unlink(str(generate_init_offline_itables_html(options.dt_bundle)))


def make_sortable(frame: pd.DataFrame, name: str) -> str:
    """Return a table as HTML that sorts and filters. Its cells and titles are HTML, `name` is its `id`."""
    from itables import to_html_datatable

    made = to_html_datatable(
        frame,
        connected=False,
        table_id=name,
        showIndex=False,
        allow_html=True,
        classes="display compact nowrap",
        column_filters="header",
        display_logo_when_loading=False,
        maxBytes=0,
        scrollX=True,
        style="width:100%",
        lengthMenu=[25, 100, 1000],
    )
    return _unlink(str(made))


def _unlink(text: str) -> str:
    """Remove the links to itables' website, since the page must work offline."""
    return re.sub(r"<a href=https://itables\.org/[^>]*>", "<a>", text)


def _escape(value: Any) -> Any:
    if value is None or pd.isna(value):
        return ""
    if isinstance(value, str):
        return html.escape(value)
    return format_value(value) if isinstance(value, bool | np.bool_) else value


def _link(path: str, text: str) -> str:
    return f'<a href="{html.escape(path, quote=True)}">{html.escape(text)}</a>'


def _find_differences(experiment: Experiment) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of all keys that differ from their defaults; "" if a key has no default."""
    differences: list[tuple[str, str, str]] = []

    def walk(model: Any, path: str) -> None:
        for key, field in type(model).model_fields.items():
            value, name = getattr(model, key), f"{path}{field.alias or key}"
            if (hasattr(value, "model_fields_set") and not field.is_required()) or hasattr(value, "model_fields_set"):
                walk(value, f"{name}.")
            elif field.is_required() or value != field.get_default(call_default_factory=True):
                default = "" if field.is_required() else _spell(field.get_default(call_default_factory=True))
                differences.append((name, _spell(value), default))

    walk(experiment, "")
    return differences


def _spell(value: Any) -> str:
    if hasattr(value, "model_dump"):
        value = value.model_dump(by_alias=True, exclude_defaults=True)
    if isinstance(value, list):
        return "[" + ", ".join(_spell(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spell(item)}" for key, item in value.items()) + "}"
    return format_value(value)


def _get_versions(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return each package with all versions of it that the points were made with."""
    by_package: dict[str, set[str]] = {}
    for line in table["versions"].dropna().unique():
        for pair in line.split():
            package, _, version = pair.partition("=")
            by_package.setdefault(package, set()).add(version)
    return [(package, ", ".join(sorted(versions))) for package, versions in sorted(by_package.items())]


def _lay_out(pipeline: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the stages as columns of a drawing, left to right, by the longest chain of stages that follows them."""
    height = {stage["rule"]: 0 for stage in pipeline}
    for stage in reversed(pipeline):
        for rule in stage["after"]:
            height[rule] = max(height[rule], height[stage["rule"]] + 1)
    return [
        [stage for stage in pipeline if height[stage["rule"]] == level] for level in range(max(height.values()), -1, -1)
    ]


def _list_files(table_file: Path, companions: Mapping[str, Path]) -> list[Path]:
    files = [table_file, table_file.with_suffix(".parquet"), companions["replicates"], table_file.parent / EXPERIMENT]
    return [file for file in files if file.is_file()]


def _as_script(value: Any) -> Markup:
    """Return a value as JSON that is safe inside a script element."""
    return Markup(json.dumps(value).replace("</", "<\\/"))


def _get_vega() -> str:
    import vl_convert

    bundle: Any = vl_convert.javascript_bundle  # its type stub requires an argument that is optional
    return str(bundle()).replace("</script", "<\\/script")
