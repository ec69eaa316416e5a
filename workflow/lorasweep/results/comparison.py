"""Compare finished experiments on the tasks that they have in common.

A task is common to experiments if its source files, arguments, limit, epochs, solver, scorer and judges are the same in
what their evaluations recorded. A gain is over the experiment's own base model.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorasweep.experiment.loading import load_experiment, read_config
from lorasweep.experiment.points import format_value, get_setting
from lorasweep.experiment.sections import MODE_KEY, Experiment
from lorasweep.layout import EXPERIMENT, MANIFEST, POINTS, TABLE
from lorasweep.results.inference import adjust_p_values
from lorasweep.results.replicates import SETTING_TEXTS, Difference, count_modes_once, measure_difference
from lorasweep.results.table import (
    CONFIDENCE,
    SampleScores,
    format_gain,
    format_metric,
    leave_out_pruned,
    list_metrics,
)
from lorasweep.util.digest import digest_text
from lorasweep.util.errors import InputError, nearest
from lorasweep.util.files import find_record

if TYPE_CHECKING:
    from rich.console import Console

_REPLACED = ("solver", "scorer")

_NOTED = (
    *("max_tokens", "temperature", "system_prompt", "prompt", "assistant_prefix"),
    *("has_plain_prompts", "chat_template", "quantize", "backend"),
)
"""Settings of an evaluation that a task may override. They may differ between experiments, which is then noted."""


@dataclass(frozen=True, eq=False)
class Finished:
    """A finished experiment, read from its folder of results."""

    name: str
    """The folder's name, with as many of its parents as it takes to tell the experiments apart."""
    folder: Path
    experiment: Experiment
    table: pd.DataFrame
    """The table of points (`results.parquet`)."""
    settings: pd.DataFrame
    """The table of settings (`replicates.csv`), without those whose trainings were stopped."""
    samples: pd.DataFrame | None
    """The scores of samples (`samples.parquet`)."""
    answer: Mapping[str, Any]
    """The answer (`answer.json`), with the names of the variables."""

    @property
    def tasks(self) -> list[str]:
        """The tasks that points were evaluated on, the deciding one first."""
        return sorted(map(str, self.table["task"].dropna().unique()), key=lambda name: name != self.answer["task"])

    @property
    def confidence(self) -> float:
        """The level of the intervals in its tables. Tables of earlier versions do not say it."""
        return float(self.table.attrs.get(CONFIDENCE, self.experiment.report.confidence))

    def get_metrics(self, task: str) -> list[str]:
        """Return the metrics that have a value on a task, in Inspect's order."""
        return list_metrics(self.folder, self.table, task)


@dataclass(frozen=True)
class Pair:
    """The best settings of two experiments."""

    experiments: tuple[str, str]
    settings: tuple[str, str]
    difference: Difference
    """Of the first to the second."""
    p_adjusted: float | None
    """The p-value, corrected for the choice of the best settings and for the number of pairs."""


@dataclass(frozen=True)
class Comparison:
    """Experiments compared by a metric on a task that is the same in all of them."""

    task: str
    metric: str
    confidence: float
    rows: pd.DataFrame
    """One row per experiment and setting: `experiment`, `setting`, `mode`, `task`, the metric and its columns
    `<metric>:<fact>`, `seeds`, and the common variables."""
    variables: tuple[str, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    """Limitations that a reader should know before quoting."""
    apart: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Experiments that are not compared, with what differs in their task of this name."""

    @property
    def sentences(self) -> list[str]:
        """What the comparison of each pair of experiments says, in words."""
        return [_tell_pair(pair, self.metric, 1 - self.confidence) for pair in self.pairs]


def read_experiments(folders: Sequence[Path]) -> list[Finished]:
    """Read finished experiments.

    Raises:
        InputError: fewer than two folders, the same one twice, one that is no experiment, or one without tables.
    """
    if len(folders) < 2:
        raise InputError("one experiment cannot be compared", "two or more folders of results")
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise InputError(f"{folders[index]}: this experiment is named twice", "different folders of results")
    return [_read(name, folder) for name, folder in zip(_tell_apart(resolved), folders, strict=True)]


def compare(experiments: Sequence[Finished], task: str | None, metric: str | None) -> list[Comparison]:
    """Compare experiments on `task`, or on each task that at least two of them have, by `metric`.

    By default, the metric is the first experiment's; with `metric`, tasks without it are left out. Of a task that is
    not the same in all experiments, those that have the same are compared, and the others are told with what differs.

    Raises:
        InputError: no two experiments have the task, or no task of that name is the same in two of them; none has the
            metric; or they disagree on whether a higher value is better.
    """
    owners = {name: [e for e in experiments if name in e.tasks] for e in experiments for name in e.tasks}
    common = [name for name, having in owners.items() if len(having) > 1]
    told = "; ".join(f"{e.name} has {', '.join(e.tasks) or 'none'}" for e in experiments)
    if task and task not in common:
        raise InputError(f"--task: {task!r} is no common task{nearest(task, common)}: {told}", ", ".join(common))
    if not common:
        raise InputError(f"the experiments have no task in common: {told}")
    higher = {e.experiment.report.higher_is_better for e in experiments}
    if len(higher) > 1:
        raise InputError("report.higher_is_better is true in some experiments and false in others", "the same in all")
    made: list[Comparison] = []
    refused: list[str] = []
    with_metric = [name for name in common if all(metric in e.get_metrics(name) for e in owners[name])]
    for name in [task] if task else with_metric or common:
        found, reasons = _compare_on(name, owners[name], metric, higher == {True})
        made += found
        refused += reasons
    if not made:
        raise InputError("\n".join(refused), "experiments with the same task")
    return made


def _read(name: str, folder: Path) -> Finished:
    file = folder / EXPERIMENT
    if not file.is_file():
        raise InputError(f"{folder}: not an experiment of lorasweep: it has no {EXPERIMENT}", "a folder of results")
    table = (folder / TABLE).with_suffix(".parquet")
    replicates, answer, samples = (folder / each for each in ("replicates.csv", "answer.json", "samples.parquet"))
    for needed in (table, replicates, answer):
        if not needed.is_file():
            raise InputError(f"{folder}: no table of results yet ({needed.name} is missing); run it to its end first")
    return Finished(
        name,
        folder,
        load_experiment(read_config(file), str(file)),
        pd.read_parquet(table),
        # How good a setting would have become whose trainings were stopped is not known.
        leave_out_pruned(pd.read_csv(replicates, dtype=SETTING_TEXTS, keep_default_na=False, na_values=[""])),
        pd.read_parquet(samples) if samples.is_file() else None,
        json.loads(answer.read_text(encoding="utf-8")),
    )


def _tell_apart(folders: Sequence[Path]) -> list[str]:
    """Return the end of each path, as short as all of them differ."""
    most = max(len(folder.parts) for folder in folders)
    ends = ([Path(*folder.parts[-size:]).as_posix() for folder in folders] for size in range(1, most + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def _compare_on(
    task: str, experiments: Sequence[Finished], metric: str | None, higher_is_better: bool
) -> tuple[list[Comparison], list[str]]:
    """Return the comparisons of the experiments whose task is the same, and the reasons where none is."""
    records = {e.name: _describe_task(e, task) for e in experiments}
    groups: list[list[Finished]] = []
    for experiment in experiments:
        same = (g for g in groups if not list(_find_differences(*(records[e.name] for e in (g[0], experiment)))))
        group = next(same, None)
        if group is None:
            groups.append([experiment])
        else:
            group.append(experiment)
    made = []
    for group in groups:
        if len(group) > 1:
            others = [e for e in experiments if e not in group]
            apart = {e.name: list(_tell_differences(group[0], e, records)) for e in others}
            made.append(_compare_group(task, group, metric, higher_is_better, apart))
    first, *others = experiments
    differences = [each for other in others for each in _tell_differences(first, other, records)]
    return made, [] if made else [f"{task} is not the same task: {'; '.join(differences)}"]


def _describe_task(finished: Finished, task: str) -> dict[str, Any]:
    """Return what determines a task, by what a message calls it. Files are known by their names and digests.

    Raises:
        InputError: the evaluation did not record its specification.
    """
    spec, versions = _read_evaluation(finished, task)
    own = next(entry for entry in spec["tasks"] if entry["name"] == task)
    facts: dict[str, Any] = {}
    paths = []
    for kind in ("task", *_REPLACED):
        reference = own.get(kind)
        path, _, function = (reference or "").partition("@")
        in_file = path.endswith(".py")
        # The one task of a file need not be named.
        facts[kind] = (function or (task if kind == "task" else "")) if in_file else reference
        if in_file:
            paths.append(path)
        elif reference and (package := reference.partition("/")[0]) in versions:
            facts[f"the version of {package}"] = versions[package]
        arguments = own.get("args" if kind == "task" else f"{kind}_args") or {}
        facts |= {f"the argument {key} of the {kind}": value for key, value in arguments.items()}
    facts |= {"limit": own["limit"], "epochs": own.get("epochs")}
    for name, role in (spec.get("model_roles") or {}).items():
        # The path of a model on disk says nothing that its fingerprint does not.
        facts[f"the model of the role {name}"] = role | {"model": role.get("fingerprint", role["model"])}
    entries = [e for e in finished.experiment.evaluation.tasks if e.task == own["task"] and e.name in (None, task)]
    files = [file for entry in sorted(entries, key=lambda entry: entry.name == task)[-1:] for file in entry.files]
    for file in dict.fromkeys([*paths, *files]):
        facts.setdefault(f"the file {Path(file).name}", []).append(spec["files"].get(file))
    return facts


def _read_evaluation(finished: Finished, task: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the specification of the evaluation of a point on a task, and the versions of packages that ran it."""
    return _read_evaluation_of(finished, str(_find_points(finished, task)[-1]))


def _find_points(finished: Finished, task: str) -> list[str]:
    return list(finished.table.loc[finished.table["task"] == task, "point"])


def _read_evaluation_of(finished: Finished, point: str) -> tuple[dict[str, Any], dict[str, str]]:
    manifest = finished.folder / point / MANIFEST
    evaluation = find_record(manifest).get("evaluation", {})
    if "spec" not in evaluation:
        raise InputError(
            f"{manifest}: does not say how the point was evaluated: the manifest is missing, or of an earlier version "
            f"of lorasweep; remove {manifest.parent / 'eval'} and run again"
        )
    return evaluation["spec"], evaluation["versions"]


def _find_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for key in {**first, **second} if first.get(key) != second.get(key))


def _tell_differences(first: Finished, second: Finished, records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    own, other = records[first.name], records[second.name]
    for key in _find_differences(own, other):
        if not key.startswith("the file "):
            yield f"{key} is {_spell(own.get(key))} in {first.name}, and {_spell(other.get(key))} in {second.name}"
        elif key in own and key in other:
            yield f"{key} differs between {first.name} and {second.name}"
        else:
            yield f"{key} belongs to it in {first.name if key in own else second.name} only"


def _spell(value: Any) -> str:
    return "not set" if value is None else json.dumps(value)


def _compare_group(
    task: str,
    experiments: Sequence[Finished],
    metric: str | None,
    higher_is_better: bool,
    apart: Mapping[str, Sequence[str]],
) -> Comparison:
    metrics = [e.get_metrics(task) for e in experiments]
    common = [name for name in metrics[0] if all(name in others for others in metrics[1:])]
    if metric and metric not in common:
        problem = f"--metric: {metric!r} is no common metric on {task}{nearest(metric, common)}"
        raise InputError(problem, ", ".join(common))
    if not common:
        told = "; ".join(f"{e.name} has {', '.join(names)}" for e, names in zip(experiments, metrics, strict=True))
        raise InputError(f"{task}: the experiments have no metric in common: {told}")
    answer = experiments[0].answer
    deciding = answer["metric"] if answer["task"] == task and answer["metric"] in common else common[0]
    metric = metric or deciding
    confidence = max(e.confidence for e in experiments)
    rows, variables = _make_rows(task, experiments, metric)
    pairs = _make_pairs(task, experiments, metric, rows, higher_is_better, confidence)
    notes = tuple(_make_notes(task, metric, experiments, rows, pairs, confidence))
    shown = rows.drop(columns=["trained_setting", "points", "_index"])
    return Comparison(task, metric, confidence, shown, variables, tuple(pairs), notes, apart)


def _make_rows(task: str, experiments: Sequence[Finished], metric: str) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Return the settings of all experiments, the common variables in columns, and the names of these variables."""
    keys = dict.fromkeys(key for e in experiments for key in e.answer["variables"] if key not in ("seed", MODE_KEY))
    frames = []
    for index, e in enumerate(experiments):
        rows = e.settings[(e.settings["task"] == task) & e.settings[metric].notna()]
        rows = rows.sort_values("mode", key=lambda modes: modes != "base", kind="stable")
        points = find_record(e.folder / POINTS)
        of_points = [points.get(str(names).split(";")[0], {}).get("settings", {}) for names in rows["points"]]
        values = {key: pd.Series([_get_plain(s, key) for s in of_points], rows.index, dtype=object) for key in keys}
        columns = [name for name in rows.columns if name == metric or name.startswith(f"{metric}:")]
        frames.append(
            rows[["setting", "trained_setting", "mode", "task", *columns, "seeds", "points"]].assign(
                **values, experiment=e.name, _index=index
            )
        )
    variables = tuple(key for key in keys if all(frame[key].notna().any() for frame in frames))
    rows = pd.concat(frames, ignore_index=True)
    first = ["experiment", "setting", "mode", "task", metric]
    kept = [name for name in rows.columns if name not in keys]
    return rows[list(dict.fromkeys([*first, *kept, *variables]))], variables


def _get_plain(settings: Mapping[str, Any], key: str) -> Any:
    value = get_setting(settings, key)
    if key == "epoch" and value is None:
        value = get_setting(settings, "epochs")
    return format_value(value, key) if isinstance(value, list | dict) else value


def _make_pairs(
    task: str,
    experiments: Sequence[Finished],
    metric: str,
    rows: pd.DataFrame,
    higher_is_better: bool,
    confidence: float,
) -> list[Pair]:
    """Compare the best settings of each two experiments.

    The best of n and that of m settings were chosen by the score that is tested, so that a p-value stands for n times m
    pairs: it is multiplied by that, and then corrected for the number of pairs of experiments (Holm).
    """
    # Points are told apart by their experiment's position.
    rows = rows.assign(points=[_mark(i, points) for i, points in zip(rows["_index"], rows["points"], strict=True)])
    tables = [e.table.assign(point=f"{i}/" + e.table["point"].astype(str)) for i, e in enumerate(experiments)]
    samples = [
        e.samples.assign(point=f"{i}/" + e.samples["point"].astype(str))
        for i, e in enumerate(experiments)
        if e.samples is not None and len(e.samples)
    ]
    table, scores = pd.concat(tables), SampleScores(pd.concat(samples) if samples else None)
    # Modes that share their adapters count once.
    distinct = count_modes_once(rows[rows["mode"] != "base"], ["_index", "trained_setting"])
    trained = distinct.sort_values(metric, ascending=not higher_is_better, kind="stable")
    counts = trained["_index"].value_counts()
    best = {i: trained[trained["_index"] == i].iloc[0].to_dict() for i in sorted(counts.index)}
    compared = list(combinations(best, 2))
    differences = [measure_difference(best[i], best[j], metric, table, scores, confidence) for i, j in compared]
    multiplied = [
        None if d.p_value is None else min(1.0, d.p_value * int(counts[i]) * int(counts[j]))
        for d, (i, j) in zip(differences, compared, strict=True)
    ]
    adjusted = iter(adjust_p_values([p for p in multiplied if p is not None]))
    return [
        Pair(
            (experiments[i].name, experiments[j].name),
            (best[i]["setting"], best[j]["setting"]),
            difference,
            None if difference.p_value is None else next(adjusted),
        )
        for difference, (i, j) in zip(differences, compared, strict=True)
    ]


def _mark(index: int, points: str) -> str:
    return ";".join(f"{index}/{point}" for point in points.split(";"))


def _make_notes(
    task: str,
    metric: str,
    experiments: Sequence[Finished],
    rows: pd.DataFrame,
    pairs: Sequence[Pair],
    confidence: float,
) -> Iterator[str]:
    for pair in pairs:
        if not pair.difference.pairs:
            many = f"their samples differ ({pair.difference.shared} in both)"
            reason = many if pair.difference.interval else "there are no scores of their samples"
            yield f"{' and '.join(pair.experiments)} are compared unpaired: {reason}."
    if (unscored := f"{metric}:unscored") in rows:
        for name, count in rows.groupby("experiment", sort=False)[unscored].sum().items():
            if count:
                yield f"{name}: {count:.0f} answers have no score, and {metric} leaves them out."
    counts = rows[rows["mode"] != "base"].groupby("experiment", sort=False).size()
    if pairs and counts.max() > 1:
        told = ", ".join(f"{count} of {name}" for name, count in counts.items())
        yield (
            f"The best settings were chosen by this score, from {told}: p-values are corrected for that and for the "
            "pairs of experiments, but intervals are not."
        )
    if (once := rows[rows["mode"] != "base"].groupby("experiment", sort=False)["seeds"].max().eq(1)).any():
        told = "each experiment" if once.all() else ", ".join(once.index[once])
        yield f"Settings of {told} were trained once: the variation between seeds is not covered."
    levels = {e.name: e.confidence for e in experiments}
    if len(set(levels.values())) > 1:
        told = ", ".join(f"{level:.0%} in {name}" for name, level in levels.items())
        yield f"Intervals of scores are of {told}; those of differences between experiments of {confidence:.0%}."
    if without := [e.name for e in experiments if "base" not in set(rows.loc[rows["experiment"] == e.name, "mode"])]:
        yield f"No gain over its own base: {', '.join(without)} did not evaluate it."
    # Points of several base models can differ within an experiment.
    specs = [[_read_evaluation_of(e, point)[0] for point in _find_points(e, task)] for e in experiments]
    for key in ("dtype", "seed", *_NOTED):
        values = [sorted({_spell(_get_effective(spec, task, key)) for spec in own}) for own in specs]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{' and '.join(own)} in {e.name}" for e, own in zip(experiments, values, strict=True))
            yield f"The evaluations differ in {key}: {told}."


def _get_effective(spec: Mapping[str, Any], task: str, key: str) -> Any:
    own = next(entry for entry in spec["tasks"] if entry["name"] == task).get(key)
    value = spec.get(key) if own is None else own
    return f"sha256 {digest_text(value)[:12]}" if key == "chat_template" and value else value


def _tell_pair(pair: Pair, metric: str, level: float) -> str:
    (first, second), (own, other) = pair.experiments, pair.settings
    difference, interval = pair.difference, pair.difference.interval
    reach = f" ({interval.low:+.3f} to {interval.high:+.3f})" if interval else ""
    many = f"the best of {first} ({own})", f"the best of {second} ({other})"
    said = f"{metric}: {many[0]} differs from {many[1]} by {difference.value:+.3f}{reach}"
    if pair.p_adjusted is None:
        return f"{said}, which cannot be tested."
    is_clear = pair.p_adjusted <= level and not (interval and interval.low <= 0 <= interval.high)
    return f"{said}, p = {pair.p_adjusted:.2g}{'' if is_clear else ': not significant'}."


def show_comparison(comparison: Comparison, console: "Console") -> None:
    """Print the settings of all experiments with their scores, and the comparisons of the best ones."""
    from lorasweep.util.tables import FoldingTable

    metric = comparison.metric
    columns = ["setting", "mode", metric, "over own base", *comparison.variables]
    table = FoldingTable(columns, texts=["mode"], title=f"{comparison.task}: {metric}")
    records: list[Any] = comparison.rows.to_dict("records")
    for row in records:
        values = [
            "" if row[key] is None or pd.isna(row[key]) else format_value(row[key], key) for key in comparison.variables
        ]
        name = f"{row['experiment']}/{row['setting']}"
        table.add_row(name, row["mode"], format_metric(row, metric), format_gain(row, metric), *values)
    console.print(table)
    for name, reasons in comparison.apart.items():
        console.print(f"Not compared: {name}, whose task is another: {'; '.join(reasons)}", highlight=False)
    console.print("\n".join([*comparison.sentences, *comparison.notes]), highlight=False)
