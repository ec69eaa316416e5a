"""Find results that are not of the experiment as it is now, by their content.

Snakemake would compare times, and its notes in `.snakemake/` on how it made each file. Neither survives when a folder
of results is copied, moved, renamed or restored. So this module says which results match the experiment. The rules
declare the inputs of those as `ancient`: their times do not matter. Snakemake is forced to make the others again.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.adapters.identity import digest_config, identify_adapter
from lorasweep.experiment.points import Point, format_value, get_setting
from lorasweep.experiment.sections import MODE_KEY
from lorasweep.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    DIGESTS,
    LAST_EPOCH,
    MANIFEST,
    MERGED,
    METRICS,
    RECORD,
    REPRODUCTION,
    RUNS,
    TABLE,
    TABLES_RECORD,
    TEMPLATE_DIGEST,
    TRAININGS,
    get_decision_file,
    get_epoch_folder,
    get_part_file,
    get_part_name,
    get_rung_name,
)
from lorasweep.results.tables_record import digest_sources
from lorasweep.running.ledger import read_runs
from lorasweep.sweep.pruning import find_end
from lorasweep.sweep.sweep import ADAPTER_FILES, Sweep
from lorasweep.sweep.trainings import is_trained
from lorasweep.trainers.identity import read_identity
from lorasweep.trainers.rungs import get_pruned_epoch
from lorasweep.util.digest import digest_file, digest_text
from lorasweep.util.files import find_record, write_record

_AGAIN = "its files are made again"
_REMADE = "its adapter is made again"
_MOST_NAMED = 5
_IN_MANIFEST = {"point", "mode", "dtype", "device", "settings", "adapter_sha256", "training", "evaluation", "files"}


@dataclass(frozen=True)
class Outdated:
    """A result that is missing or does not match the experiment."""

    name: str
    """The name of the point or training; "" for a result of the whole experiment."""
    rule: str
    """The rule that makes it again."""
    file: str
    """An output of that rule's job, relative to the working directory."""
    reason: str
    """Why the result does not match; "" if it is missing."""


def find_outdated(sweep: Sweep) -> list[Outdated]:
    """Return the results that are missing, or do not match the experiment, the base model or their records.

    Missing merged models are not included, nor are trainings whose adapters no point needs.

    Files with the size and the time in their manifest are not read. The digests of others are kept in the experiment's
    folder. Without the base model, nothing can be compared.
    """
    if sweep.missing_model or not sweep.results.is_dir():
        return []
    finder = _Finder(sweep)
    found = list(finder.find())
    finder.digests.save()
    return found


def describe_outdated(sweep: Sweep, found: Iterable[Outdated]) -> str:
    """Return a text for the begin of a run: what was taken over from another folder, and what is made again and why.

    "" if all results match, and were made here.
    """
    first: dict[str, str] = {}
    incomplete = set()
    for outdated in found:
        incomplete.add(outdated.name)
        if outdated.name and outdated.reason:
            first.setdefault(outdated.name, f"{outdated.rule}: {outdated.reason}")
    lines = []
    runs = read_runs(sweep.results / RUNS)
    if runs and runs[-1].folder not in ("", str(sweep.results.resolve())):
        kept = sum(name not in incomplete for name in sweep.folders)
        lines.append(f"Taken over from {runs[-1].folder}: {kept} of {len(sweep.folders)} points match the experiment.")
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in first.items():
        names_by_reason.setdefault(reason, []).append(name)
    if first:
        lines.append(f"Made again, as they do not match the experiment or their records: {len(first)}.")
    for reason, names in names_by_reason.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        lines.append(f"  {', '.join(names[:_MOST_NAMED])}{more}: {reason}")
    return "\n".join(lines)


class _Digests:
    """The digests of files, read again only if a file's size or time is not on record."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._known = find_record(results / DIGESTS)
        self._current: dict[str, Any] = {}

    def get(self, file: Path, entry: Mapping[str, Any] | None = None) -> str:
        """Return a file's digest; `entry` is the file's entry in a manifest."""
        state = file.stat()
        if entry and (entry["bytes"], entry.get("modified")) == (state.st_size, state.st_mtime_ns):
            return str(entry["sha256"])
        key = str(file)
        known = self._known.get(key)
        if not known or known[:2] != [state.st_size, state.st_mtime_ns]:
            known = [state.st_size, state.st_mtime_ns, digest_file(file)]
        self._current[key] = known
        return str(known[2])

    def save(self) -> None:
        """Keep the digests of the files that were looked at, if the folder can be written to."""
        if self._current != self._known:
            with contextlib.suppress(OSError):
                write_record(self._results / DIGESTS, self._current)


class _Finder:
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._results = sweep.results
        self.digests = _Digests(sweep.results)
        # What follows from the numbers on disk, by the epoch; see `Race.decide`.
        self._decisions = sweep.race.decide() if sweep.race else {}
        self._needed: set[str] = set()  # trainings whose adapter a point will take
        self._is_complete = True

    def find(self) -> Iterator[Outdated]:
        for name in self._sweep.folders:
            yield from self._check_point(name)
        yield from self._check_trainings()
        yield from self._check_tables()

    def _check_point(self, name: str) -> Iterator[Outdated]:
        sweep, folder = self._sweep, self._results / name
        point = sweep.points.get(name)
        manifest = find_record(folder / MANIFEST)
        if not manifest.keys() >= _IN_MANIFEST:  # of another version, or torn
            manifest = {}
        listed: dict[str, Any] = {entry["path"]: entry for entry in manifest.get("files", ())}
        changed = list(self._find_changed(folder, listed))
        # A manifest repeats the records, which saves reading them.
        trust = bool(manifest) and not changed
        problems: dict[str, str] = {}
        adapter: Mapping[str, str] = {}
        is_complete = bool(manifest)
        if point:
            rule = "take" if point.training else "adopt"
            record = manifest["training"] if trust else find_record(folder / "adapter" / RECORD)
            adapter = identify_adapter(record)
            problem = self._find_adapter_problem(point, folder, record, changed, listed)
            if problem is not None:
                is_complete = False
                adapter = self._get_next_adapter(point)
                problems[rule] = problem and (self._explain(point, manifest) or problem)
            if point.mode == "A":
                problem = self._find_model_problem(name, folder / "hf_model", adapter, changed)
                is_complete &= problem is None
                if problem is not None:
                    problems["export"] = problem
        if name in sweep.evaluated:
            problem = self._find_evaluation_problem(name, adapter, manifest["evaluation"] if trust else None, changed)
            is_complete &= problem is None
            if problem is not None:
                problems["publish" if sweep.evaluated[name] == "B2" else "evaluate"] = problem
            if problem is not None and sweep.evaluated[name] == "B1":
                merged = self._results / MERGED / name
                if merged.is_dir() and self._find_model_problem(name, merged, adapter, ()) is not None:
                    problems["merge"] = "it was merged from another adapter or base model"
        problem = _AGAIN if (folder / MANIFEST).is_file() else ""
        if manifest and is_complete:
            problem = self._find_manifest_problem(name, manifest, adapter)
        if problem is not None:
            is_complete = False
            problems["cleanup"] = problem
        self._is_complete &= is_complete
        for rule, reason in problems.items():
            yield Outdated(name, rule, str(self._results / self._get_output(rule, name)), reason)

    def _get_output(self, rule: str, name: str) -> Path:
        return {
            "take": Path(name, "adapter", RECORD),
            "adopt": Path(name, "adapter", RECORD),
            "export": Path(name, "hf_model"),
            "merge": Path(MERGED, name),
            "evaluate": Path(name, "eval", METRICS),
            "publish": Path(name, "eval", METRICS),
            "cleanup": Path(name, MANIFEST),
        }[rule]

    def _find_changed(self, folder: Path, listed: Mapping[str, Any]) -> Iterator[str]:
        """Yield the files of a manifest that are missing or have other bytes."""
        for path, entry in listed.items():
            if path == f"eval/{REPRODUCTION}":  # which nothing is made of, and who copied a point may have left
                continue
            try:
                if self.digests.get(folder / path, entry) != entry["sha256"]:
                    yield path
            except OSError:
                yield path

    # Each of these returns why a result is made again: a reason, "" if it is missing, `None` if it matches.

    def _find_adapter_problem(
        self, point: Point, folder: Path, record: Mapping[str, Any], changed: Iterable[str], listed: Mapping[str, Any]
    ) -> str | None:
        recipe = folder / "recipe.yaml"
        files = [folder / "adapter" / name for name in ADAPTER_FILES] + ([recipe] if point.training else [])
        if not all(file.is_file() for file in files):
            return ""
        if file := next((path for path in changed if path.startswith(("adapter/", "recipe.yaml"))), None):
            return f"{file} is not as it was made"
        if point.training:
            if read_identity(recipe) != self._sweep.identify_training(point):
                chosen = ", or its epoch was chosen otherwise" if self._sweep.validation else ""
                return f"it was trained with other settings, data or another base model{chosen}"
            if record.get("recipe_sha256") != self.digests.get(recipe, listed.get("recipe.yaml")):
                return "it was not trained with its recipe.yaml"
            if point.epoch and record.get("epochs") != point.epoch:
                return f"it is of epoch {record.get('epochs')}"
            if problem := self._find_stop_problem(point.training, record):
                return problem
        elif record.get("adopted_sha256") != self.digests.get(Path(str(point.adapter), ADAPTER_WEIGHTS)):
            return f"{point.adapter} has another adapter now"
        elif digest_config(folder / "adapter") != digest_config(Path(str(point.adapter))):
            return f"{point.adapter} has another {ADAPTER_CONFIG} now"
        elif record.get(TEMPLATE_DIGEST) != self._digest_template(point.name):
            return "its chat template is another now"
        if record.get("base_model_fingerprint") != self._sweep.get_fingerprint(point.name):
            return "it was made for another base model"
        weights = f"adapter/{ADAPTER_WEIGHTS}"
        if self.digests.get(folder / weights, listed.get(weights)) != identify_adapter(record).get("adapter_sha256"):
            return f"{weights} is not as it was made"
        return None

    def _find_model_problem(
        self, name: str, model: Path, adapter: Mapping[str, str], changed: Iterable[str]
    ) -> str | None:
        if not model.is_dir():
            return ""
        if not adapter:
            return _REMADE
        if file := next((path for path in changed if path.startswith("hf_model/")), None):
            return f"{file} is not as it was made"
        record = find_record(model / RECORD)
        base = {"base_model_fingerprint": self._sweep.get_fingerprint(name), "precision": self._sweep.get_dtype(name)}
        if any(record.get(key) != value for key, value in {**adapter, **base}.items()):
            return "it was merged from another adapter or base model"
        if record.get(TEMPLATE_DIGEST) != self._digest_template(name):
            return "it has another chat template"
        return None

    def _digest_template(self, point: str) -> str | None:
        given = self._sweep.get_given_template(point)
        return None if given is None else digest_text(given)

    def _find_evaluation_problem(
        self, name: str, adapter: Mapping[str, str], metrics: Mapping[str, Any] | None, changed: Iterable[str]
    ) -> str | None:
        folder = self._results / name / "eval"
        if not (folder / METRICS).is_file():
            return ""
        if name in self._sweep.points and not adapter:
            return _REMADE
        if file := next((path for path in changed if path.startswith("eval/")), None):
            return f"{file} is not as it was made"
        metrics = find_record(folder / METRICS) if metrics is None else metrics
        if metrics.get("evaluation_sha256") != self._sweep.get_evaluation_spec(name).sha256:
            return "it was evaluated with other settings, tasks or another base model"
        if any(metrics.get(key) != value for key, value in {"adapter_sha256": None, **adapter}.items()):
            return "another adapter was evaluated"
        logs = [f"{task.name}.eval" for task in self._sweep.get_tasks(name)]
        return next((f"eval/{log} is missing" for log in logs if not (folder / log).is_file()), None)

    def _find_manifest_problem(self, name: str, manifest: Mapping[str, Any], adapter: Mapping[str, str]) -> str | None:
        settings = {"mode": manifest["mode"], "dtype": manifest["dtype"], "device": manifest["device"]}
        if settings | manifest["settings"] != self._sweep.get_plain_settings(name):
            return "its manifest has other settings"
        if sorted(manifest["evaluation"].get("tasks", ())) != self._sweep.get_task_names(name):
            return "its manifest has other tasks"
        if (manifest["point"], manifest["adapter_sha256"]) != (name, adapter.get("adapter_sha256")):
            return "its manifest is of another point or adapter"
        return None

    def _explain(self, point: Point, manifest: Mapping[str, Any]) -> str:
        """Return the settings that differ from those in the manifest, as text; "" if none does."""
        before: Mapping[str, Any] = manifest.get("settings") or {}
        now = {key: value for key, value in point.settings.items() if key != MODE_KEY}
        pairs = {key: (get_setting(before, key), get_setting(now, key)) for key in dict.fromkeys([*before, *now])}
        return "; ".join(
            f"{key} was {format_value(was, key)}, is {format_value(value, key)}"
            for key, (was, value) in pairs.items()
            if before and was != value
        )

    def _get_next_adapter(self, point: Point) -> dict[str, str]:
        """Return what the adapter that a point gets is known by; {} if that is not known before it is trained."""
        if not point.training:
            source = Path(str(point.adapter))
            weights = self.digests.get(source / ADAPTER_WEIGHTS)
            return identify_adapter({"adopted_sha256": weights, "adopted_config_sha256": digest_config(source)})
        self._needed.add(point.training)
        training = self._results / TRAININGS / point.training
        if not is_trained(training) or self._find_training_problem(point.training, "adapter"):
            return {}
        folder = get_epoch_folder(point.epoch) if point.epoch else "adapter"
        return identify_adapter(find_record(training / folder / RECORD))

    def _find_training_problem(self, training: str, adapter: str) -> str | None:
        folder, owner = self._results / TRAININGS / training, self._sweep.points[self._sweep.trainings[training]]
        recipe = folder / "recipe.yaml"
        if not recipe.is_file() or read_identity(recipe) != self._sweep.identify_training(owner):
            return "its recipe.yaml is of other settings, data or another base model"
        record = find_record(folder / adapter / RECORD)
        if record.get("recipe_sha256") != self.digests.get(recipe):
            return "it was not trained with its recipe.yaml"
        return self._find_stop_problem(training, record)

    def _find_stop_problem(self, training: str, record: Mapping[str, Any]) -> str | None:
        """Return why an adapter whose training was stopped is made again; `None` if it is not.

        What was trained further than it is stopped now stays as it is.
        """
        after = get_pruned_epoch(record)
        if after is None:
            return None
        if not self._sweep.race:
            return f"it was stopped after epoch {after}, and nothing stops it now"
        stop, is_certain = find_end(self._decisions, training)
        if stop is not None and stop <= after:
            return None
        return f"it was stopped after epoch {after}, and {'goes' if is_certain else 'may go'} on now"

    def _find_undecided_problem(self, training: str) -> str | None:
        """Return why the adapters from which a task chooses are made again; as `_find_training_problem` otherwise."""
        folder = self._results / TRAININGS / training
        if not (folder / LAST_EPOCH / RECORD).is_file():
            return ""
        for name in (LAST_EPOCH, *map(get_epoch_folder, self._sweep.get_kept_epochs(training))):
            if not (folder / name / ADAPTER_WEIGHTS).is_file():
                return f"{name}/{ADAPTER_WEIGHTS} is missing"
        return self._find_training_problem(training, LAST_EPOCH)

    def _check_trainings(self) -> Iterator[Outdated]:
        is_training = False
        for training in sorted(self._needed):
            folder = self._results / TRAININGS / training
            problem = self._find_training_problem(training, "adapter") if is_trained(folder) else ""
            if problem is None:
                continue
            if self._sweep.validation:
                yield Outdated(training, "choose_epoch", str(folder / "adapter" / RECORD), problem)
                problem = self._find_undecided_problem(training)
                if problem is None:
                    continue
            is_training = True
            yield Outdated(training, "train", str(folder / self._sweep.last_epoch_folder / RECORD), problem)
            recipe = folder / "recipe.yaml"
            if recipe.is_file() and recipe.read_text(encoding="utf-8") != self._sweep.get_recipe(training):
                yield Outdated(training, "configure", str(recipe), "it is of other settings or another folder")

        if is_training:
            yield from self._check_race()

    def _check_race(self) -> Iterator[Outdated]:
        """Yield the decisions that do not follow from the numbers on disk, and the parts that they wait for."""
        for after, decision in self._decisions.items():
            file = get_decision_file(self._results, after)
            if self._sweep.race is None or (decision is not None and find_record(file) == decision):
                continue
            reason = "it is of other trainings, numbers or settings" if file.is_file() else ""
            yield Outdated(get_rung_name(after), "prune", str(file), reason)
            for contender in self._sweep.race.list_missing(after):
                record = get_part_file(self._results, contender.training, after)
                reason = "it has no number, or its adapter is gone" if record.is_file() else ""
                yield Outdated(get_part_name(contender.training, after), "train_part", str(record), reason)

    def _check_tables(self) -> Iterator[Outdated]:
        settings = json.loads(self._sweep.summary_settings)
        recorded = find_record(self._results / TABLES_RECORD)
        made_of = digest_sources(self._results, self._sweep.folders, settings) if self._is_complete else {}
        files = {"read_samples": "samples.parquet", "collect": TABLE, "report": "report.html"}
        for rule in settings:
            file = self._results / files[rule]
            if not file.is_file():
                yield Outdated("", rule, str(file), "")
            elif not self._is_complete or recorded.get(rule) != made_of[rule]:
                yield Outdated("", rule, str(file), "it is of other points or settings")
