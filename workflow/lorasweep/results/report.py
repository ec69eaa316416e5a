"""The report: one offline page with the answer, the plots, and the provenance of each number.

Snakemake's own report is not used: it is about the workflow's files, needs a network to be made, and has no place for
an answer to the question.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from markupsafe import Markup, escape

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import format_value
from lorasweep.experiment.sections import MODEL_KEY, Data, Experiment
from lorasweep.layout import EXPERIMENT, FAILURE_RECORD, STORAGE, TRAINING_LOG, is_base
from lorasweep.results.labels import get_differing, is_trained, label_points, label_settings, plain, shorten
from lorasweep.results.page import (
    Cell,
    Column,
    Section,
    get_values,
    list_intervals,
    list_numbers,
    pair,
    render,
    start_bundling,
)
from lorasweep.results.plots import draw_losses, draw_metric, draw_storage
from lorasweep.results.pruning import list_stopped, look_back, read_decisions
from lorasweep.results.replicates import SETTING_TEXTS
from lorasweep.results.table import PRUNED, format_samples, leave_out_pruned, list_metrics
from lorasweep.results.usage import IDLE, describe_usage
from lorasweep.util.files import read_tail
from lorasweep.util.formats import format_bytes, format_seconds
from lorasweep.util.vega import Plot, write_pictures

_LOG_LINES = 12
"""Number of log lines shown with a failure."""

_SHORT = 15
"""Maximum number of characters of the values of a variable that has a column of its own."""

_MOST_COLUMNS = 14
"""Maximum number of columns of a table: what fits a window of 1400 pixels."""

_LOGS_IN_PAGE = 300
"""Maximum number of points whose loss is drawn. Of more points, an evenly spaced selection is drawn."""


def make_report(table_file: Path, pipeline: Sequence[Mapping[str, Any]], page: Path, plots: Path) -> None:
    """Write the report and the plots of an experiment, given its table of points.

    The table's folder must hold its companions (`replicates.csv`, `answer.json`) and `experiment.yaml`. It may hold
    other files of a run: `failures.json`, `ledger.csv` and `storage.csv`. `pipeline` are the stages of
    `lorasweep.stages` as plain values.
    """
    bundling = start_bundling()
    results = table_file.parent
    is_partial = table_file.stem.endswith("-partial")
    companions = {
        name: table_file.with_name(table_file.name.replace("results", name)) for name in ("replicates", "answer")
    }
    table = pd.read_parquet(table_file.with_suffix(".parquet"))
    settings = pd.read_csv(companions["replicates"], dtype=SETTING_TEXTS, keep_default_na=False, na_values=[""])
    answer = json.loads(companions["answer"].with_suffix(".json").read_text(encoding="utf-8"))
    configuration = yaml.safe_load((results / EXPERIMENT).read_text(encoding="utf-8"))
    experiment = load_experiment(configuration, str(results / EXPERIMENT))
    variables = answer["variables"]
    sections = _make_sections(results, leave_out_pruned(table), leave_out_pruned(settings), answer, experiment)
    decisions = read_decisions(results, experiment.rungs)
    runs = _draw_runs(results, table, variables)
    drawn = [plot for section in sections for plot in section.plots] + runs
    write_pictures(drawn, plots)
    labels = label_settings(table, variables)
    # The complete report is made only if no job failed; a failure record is then that of an earlier run.
    has_failures = is_partial and (results / FAILURE_RECORD).is_file()
    failures = json.loads((results / FAILURE_RECORD).read_text(encoding="utf-8")) if has_failures else []
    text = render(
        "report.html.jinja",
        drawn,
        bundling,
        name=experiment.experiment.name,
        question=experiment.experiment.question,
        answer=answer,
        sentence=_use_labels(answer["sentence"], labels),
        caveats=[_use_labels(caveat, labels) for caveat in answer["caveats"]],
        labels=labels,
        best=", ".join(labels.get(name, name) for name in answer["equal"] or [answer["best"]] if name),
        is_partial=is_partial,
        made=datetime.now(UTC).isoformat(timespec="minutes"),
        facts=_get_facts(results, table, failures),
        sections=sections,
        runs=runs,
        stopped=_list_stopped(table, answer, decisions, variables),
        pruning=look_back(results, table, answer["best"], decisions, experiment.prune, variables),
        usage=describe_usage(results, label_points(table, variables), experiment.rungs),
        idle=IDLE,
        failures=[
            {**failure, "tail": "\n".join(read_tail(Path(failure["log"]))[-_LOG_LINES:])} for failure in failures
        ],
        results=results.as_posix(),
        differences=_find_differences(experiment),
        configuration=yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True, width=100),
        versions=_get_versions(table),
        revisions=sorted({each for made_with in table["git_revision"].dropna() for each in made_with.split()}),
        columns=_lay_out(pipeline),
        # What a batch starts, loads and merges is of no point.
        shares_loads=bool(((table["mode"] == "B2") & (table["gpu_hours"] > 0) & table["task"].notna()).any()),
        has_baseline=bool(table["point"].map(is_base).any()),
        confidence=experiment.report.confidence,
        files=[(results / name).name for name in _list_files(table_file, companions)],
    )
    page.write_text(text, encoding="utf-8")


def _make_sections(
    results: Path, table: pd.DataFrame, settings: pd.DataFrame, answer: Mapping[str, Any], experiment: Experiment
) -> list[Section]:
    """Return a section for each task, the deciding one first, and one for the points that are not evaluated."""
    variables, sections = answer["variables"], list[Section]()
    labels = label_points(table, variables)
    for task in sorted(table["task"].dropna().unique(), key=lambda task: task != answer["task"]):
        rows = table[table["task"] == task]
        metrics = list_metrics(results, table, task)
        if task == answer["task"] and answer["metric"] in metrics:
            metrics.sort(key=lambda metric: metric != answer["metric"])
        higher_is_better = experiment.report.higher_is_better
        drawn = draw_metric(settings, table, variables, task, metrics[0], higher_is_better) if metrics else []
        columns = [_name(rows, labels), *_list_scores(rows, metrics[:1], experiment.report.confidence)]
        last = [*_list_counts(rows, metrics[:1]), *([] if sections else _list_costs(rows)), _link_logs(results, rows)]
        columns += [list_numbers(rows, metric, metric) for metric in metrics[1:]][: _MOST_COLUMNS - len(columns + last)]
        varied = _list_variables(rows, variables)
        columns += [*(varied if len(columns + varied + last) <= _MOST_COLUMNS else []), *last]
        best = [answer["best"], *answer["equal"]] if task == answer["task"] else []
        is_best = rows["setting"].isin(best) | rows["trained_setting"].isin(best)
        sections.append(Section(task, drawn, columns, [index for index, is_one in enumerate(is_best) if is_one]))
    if len(rows := table[table["task"].isna()]):
        columns = [_name(rows, labels), *_list_variables(rows, variables), *_list_costs(rows)]
        sections.append(Section("Not evaluated", [], columns))
    return sections


def _list_stopped(
    table: pd.DataFrame, answer: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]], variables: Sequence[str]
) -> Section | None:
    """Return a table of the points whose trainings were stopped, with their values of the deciding metric."""
    rows = table[table["task"] == answer["task"]] if answer["task"] else table
    metric = answer["metric"] if answer["metric"] in rows else None
    return list_stopped(rows, decisions, metric, label_points(table, variables))


def _draw_runs(results: Path, table: pd.DataFrame, variables: Sequence[str]) -> list[Plot]:
    """Draw the losses and the storage."""
    order = list(table["point"].unique())
    # The log of an earlier epoch is the beginning of the last epoch's log, so only that one is drawn.
    trained = table.dropna(subset="recipe").sort_values("steps").drop_duplicates("recipe_sha256", keep="last")
    losses = draw_losses(_read_losses(results, sorted(trained["point"], key=order.index)), trained, variables)
    storage = results / STORAGE
    stored = draw_storage(pd.read_csv(storage)) if storage.is_file() else None
    return [plot for plot in (losses, stored) if plot]


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
    facts = [("points", f"{points}"), *([("failed", f"{len(failures)}")] if failures else [])]
    if stopped := table[table[PRUNED].notna()]["point"].nunique() if PRUNED in table else 0:
        facts.append(("stopped early", f"{stopped}"))
    facts.append(("kept on disk", format_bytes(kept)))
    ledger = results / "ledger.csv"
    if ledger.is_file() and len(rows := pd.read_csv(ledger)):
        total = rows.iloc[-1]
        if total["full_model_bytes"] > kept:
            facts.append(("as full models", format_bytes(total["full_model_bytes"])))
    seconds = once[[column for column in once.columns if column.endswith("_seconds")]].sum().sum()
    facts.append(("in jobs", format_seconds(seconds)))
    if hours := once["gpu_hours"].sum():
        facts.append(("on GPUs", format_seconds(hours * 3600)))
    return facts


def _name(rows: pd.DataFrame, labels: Mapping[str, str]) -> Column:
    return Column("point", [Cell(labels[point], link=f"{point}/") for point in rows["point"]], "name")


def _list_scores(rows: pd.DataFrame, metrics: Sequence[str], confidence: float) -> list[Column]:
    """Return the columns of metrics, with their intervals and gains."""
    columns = []
    for metric in metrics:
        interval = f"{confidence:.0%} interval"
        columns += [list_numbers(rows, metric, metric), list_intervals(rows, f"{metric}:", interval)]
        columns += [list_numbers(rows, f"{metric}:delta", "over base", "+")]
        columns += [list_intervals(rows, f"{metric}:delta_", interval, "+")]
        values = get_values(rows, f"{metric}:p_adjusted")
        texts = ["" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in values]
        columns += [Column("p, corrected", [Cell(text, p) for text, p in pair(texts, values)])]
    return [column for column in columns if any(cell.text for cell in column.cells)]


def _list_variables(rows: pd.DataFrame, variables: Sequence[str]) -> list[Column]:
    columns = []
    if MODEL_KEY in rows:  # that of a baseline that is no base model is a path, which the baseline's name stands for
        is_path = (rows["mode"] == "base") & ~rows["point"].map(is_base)
        rows = rows.assign(**{MODEL_KEY: rows[MODEL_KEY].mask(is_path)})
    for key in get_differing(rows[rows["mode"] != "base"], variables):
        short, values = shorten(rows[key], key), [plain(value) for value in rows[key]]
        texts = [
            short[format_value(value, key)] if has_all or value is not None else ""
            for value, has_all in zip(values, is_trained(rows), strict=True)
        ]
        if max(map(len, texts)) <= _SHORT:  # the names have what is longer
            columns.append(Column(key, [Cell(text) for text in texts], "aside"))
    return columns


def _list_counts(rows: pd.DataFrame, metrics: Sequence[str]) -> list[Column]:
    """Return the number of samples, if it differs between points, or if some have no score of the metrics."""
    texts = [format_samples(row, metrics) for _, row in rows.iterrows()]
    differ = len(set(texts)) > 1 or any(" of " in text for text in texts)
    return [Column("samples", [Cell(text, int(text.split()[0])) for text in texts])] if differ else []


def _list_costs(rows: pd.DataFrame) -> list[Column]:
    sizes, hours = get_values(rows, "bytes"), get_values(rows, "gpu_hours")
    seconds = [None if not hour else format_seconds(hour * 3600) for hour in hours]
    busy = get_values(rows, "gpu_busy")
    shares = [None if share is None else f"{share:.0%}" for share in busy]
    columns = [
        list_numbers(rows, "final_train_loss", "train loss"),
        list_numbers(rows, "final_validation_loss", "validation loss"),
        *([list_numbers(rows, "validation_score", "validation score")] if "validation_score" in rows else []),
        *_list_epochs(rows),
        Column("size", [Cell(format_bytes(size), size) for size in sizes]),
        Column("GPU time", [Cell(text, hour) for text, hour in pair(seconds, hours)]),
        Column("GPU busy", [Cell(text, share) for text, share in pair(shares, busy)]),
    ]
    return [column for column in columns if any(cell.text for cell in column.cells)]


def _list_epochs(rows: pd.DataFrame) -> list[Column]:
    """Return the epochs that were kept as the best, and how many ran, if they are not simply the last."""
    sources = {"best epoch": "epoch", "epochs trained": "epochs_trained"} if "epochs_trained" in rows else {}
    return [
        Column(title, [Cell("" if value is None else str(value), value or "") for value in get_values(rows, source)])
        for title, source in sources.items()
    ]


def _link_logs(results: Path, rows: pd.DataFrame) -> Column:
    logs = [Path(log).relative_to(results).as_posix() for log in rows["log"]]
    return Column("log", [Cell("log", link=log) for log in logs], "aside")


def _use_labels(sentence: str, labels: Mapping[str, str]) -> Markup:
    """Return a sentence in which settings have their labels, in bold."""
    names = sorted((name for name in labels if "=" in name), key=len, reverse=True)
    if not names:
        return Markup(escape(sentence))
    pattern = rf"(?<![\w.+=-])({'|'.join(map(re.escape, names))})(?![\w.+=-]*[\w+=-])"
    parts = re.split(pattern, sentence)
    return Markup("").join(
        Markup("<b>{}</b>").format(labels[part]) if index % 2 else part for index, part in enumerate(parts)
    )


def _find_differences(experiment: Experiment) -> list[tuple[str, str, str]]:
    """Return (key, value, default) of all keys that differ from their defaults; "" if a key has no default."""
    differences: list[tuple[str, str, str]] = []

    def walk(model: Any, path: str) -> None:
        for key, field in type(model).model_fields.items():
            value, name = getattr(model, key), f"{path}{field.alias or key}"
            value = experiment.derived.get(key, value) if model is experiment.controls else value
            if (hasattr(value, "model_fields_set") and not field.is_required()) or hasattr(value, "model_fields_set"):
                walk(value, f"{name}.")
            elif field.is_required() or value != field.get_default(call_default_factory=True):
                default = "" if field.is_required() else _spell(field.get_default(call_default_factory=True))
                differences.append((name, _spell(value), default))

    walk(experiment, "")
    return differences


def _spell(value: Any) -> str:
    if isinstance(value, Data):
        value = value.given
    elif hasattr(value, "model_dump"):
        value = value.model_dump(by_alias=True, exclude_defaults=True)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_spell(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_spell(item)}" for key, item in value.items()) + "}"
    return format_value(value)


def _get_versions(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Return each package with all versions of it that the points were made with."""
    by_package: dict[str, set[str]] = {}
    for line in table["versions"].dropna().unique():
        for entry in line.split():
            package, _, version = entry.partition("=")
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
