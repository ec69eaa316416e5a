"""The points of a sweep: their settings and names.

A point is identified by its settings, not by its position in the file. Its name is made of the values that vary
(`lora_rank=8__lr=1e-4`) and does not change later: `results/<experiment>/points.json` records the settings of each
name. Turning a control into a variable, or a variable into a control, renames no existing point.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from lorasweep.experiment.grid import check_mode, check_set, choose_data, derive_controls, make_combinations
from lorasweep.experiment.interpolation import derive, find_derived
from lorasweep.experiment.loading import parse_section, parse_setting
from lorasweep.experiment.sections import (
    BASE_KEY,
    CHECKPOINT_KEYS,
    DATA_KEYS,
    DEFAULT_TRAINER,
    MODE_KEY,
    MODEL_KEY,
    NAME_PATTERN,
    NAME_RULE,
    PROMPT_KEYS,
    SET_KEY,
    TRAINER_KEY,
    Base,
    Controls,
    Data,
    DataKey,
    Evaluation,
    Experiment,
    Mode,
    Model,
    get_mode,
)
from lorasweep.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    RESERVED_NAMES,
    get_baseline_name,
    get_checkpoint_name,
    is_base,
)
from lorasweep.util.errors import InputError
from lorasweep.util.files import read_record, write_record

_VALUE = r"[A-Za-z0-9._+-]+"
"""Pattern for values in a point's name."""

_ABRIDGED = 20
"""Number of characters of a prompt or a file's name that a point's name contains."""

LONGEST_NAME = 150
"""Maximum length of a point's name. A file name may have 255 characters; the remainder is reserved for suffixes."""

SEPARATOR = "__"
"""Separator of the parts of a point's name."""

SCIENTIFIC_KEYS = ("lr", "weight_decay")
"""Keys whose values are written as `1e-2` in names. Values of other keys are written as `0.01`."""

_SETS = ("lora_attn_modules", "lora_modules", "modules_to_save")
"""Keys whose lists have no order."""

_DEFAULTS = {**dict(Data()), **dict(Controls()), TRAINER_KEY: DEFAULT_TRAINER, BASE_KEY: "full"}


@dataclass(frozen=True)
class Point:
    """A training and its evaluation, the checkpoint of an earlier epoch of a training, or an existing adapter."""

    name: str
    swept: tuple[str, ...]
    """The keys that `variables`, `sample` or the run set for this point. `mode` replaces the keys of its parts."""
    controls: Controls
    mode: Mode
    model: Model
    """The base model."""
    model_name: str | None = None
    """Its name under `models`, if it has one."""
    is_run: bool = False
    """Whether the point is listed, and named, under `runs`."""
    adapter: str | None = None
    """The path of an existing adapter. If set, `controls` and `trainer` have no meaning."""
    trainer: str = DEFAULT_TRAINER
    base: Base = "full"
    """The base model that the adapter is evaluated on; see `evaluation.base`."""
    data: Data = field(default_factory=Data)
    """The experiment's data section, with the keys of the point's set of data, and with its own values."""
    data_set: str | None = None
    """The name of the point's set of data, if it has one."""
    varied_files: tuple[DataKey, ...] = ()
    """The keys of files that vary between points, so that the settings of each point have them."""
    training: str | None = None
    """The name of the training that produces the adapter; see lorasweep.sweep.trainings."""
    trained_by: str | None = None
    """The point that owns this training, if it is another point."""
    epoch: int | None = None
    """The epoch of this checkpoint, if it is earlier than the training's last epoch."""
    is_evaluated: bool = True
    """Whether `evaluation.epochs` includes the point's epoch, and some task is for the point."""
    tasks: tuple[str, ...] | None = None
    """Names of the tasks that the point is evaluated on; `None`: all. See lorasweep.experiment.task_choice."""

    @property
    def trained_name(self) -> str:
        """The name of the point of the training's last epoch."""
        return self.name.removesuffix(get_checkpoint_name("", self.epoch)) if self.epoch else self.name

    @property
    def is_trained(self) -> bool:
        """Whether the point has its own training."""
        return not self.adapter and not self.trained_by and self.epoch is None

    def _get_controls(self) -> dict[str, Any]:
        """Return the controls. Those that are omitted at their default are included if they vary."""
        varied = {key: getattr(self.controls, key) for key in self.swept if key in Controls.model_fields}
        return self.controls.model_dump(by_alias=True) | varied

    def _get_data(self) -> dict[str, Any]:
        """Return the values of `data` that the settings have. What is `null` is omitted, also if it varies."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in vars(self.data.asked if self.adapter else self.data).items()
            if value != _DEFAULTS[key] or (key in self.swept and value is not None)
            if key not in DATA_KEYS or key in self.varied_files
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the point, as plain values: the controls with the override, or the existing adapter; the
        trainer, if it varies or is not the default one; the names of the base model and of the set of data; the keys of
        data that vary or are not at their default, but files only if they vary; the mode; and the epoch, if it is an
        earlier one."""
        is_said = not self.adapter and (TRAINER_KEY in self.swept or self.trainer != DEFAULT_TRAINER)
        return {
            **({"adapter": self.adapter} if self.adapter else self._get_controls()),
            **({TRAINER_KEY: self.trainer} if is_said else {}),
            **({MODEL_KEY: self.model_name} if self.model_name else {}),
            **({SET_KEY: self.data_set} if self.data_set else {}),
            **self._get_data(),
            **({BASE_KEY: self.base} if BASE_KEY in self.swept or self.base != "full" else {}),
            MODE_KEY: self.mode,
            **({"epoch": self.epoch} if self.epoch else {}),
        }


def get_points(experiment: Experiment, registry: Path) -> dict[str, Point]:
    """Return the points of an experiment by name, in the order of the file. Each is followed by its earlier epochs.

    `registry` is the experiment's `points.json`, which need not exist yet.

    Raises:
        InputError: `make_combinations` fails, a value cannot be part of a file name, a run has no valid name, two
            points are the same, no point has a set of data or a model of `models`, a point has no model, or one has an
            epoch that `evaluation.epochs` lists.
    """
    grid = [_make_point(experiment, values) for values in make_combinations(experiment)]
    names = _NamesOnRecord(read_record(registry, dict))
    runs = [_parse_run(experiment, index, run) for index, run in enumerate(experiment.runs)]
    if varied := tuple(key for key in DATA_KEYS if any(key in point.swept for point in (*grid, *runs))):
        grid, runs = ([replace(point, varied_files=varied) for point in points] for points in (grid, runs))
    named = [replace(point, name=names.recall(point) or _make_name(point)) for point in grid]
    named += runs
    _check_names(experiment, named)
    if not named and not (experiment.evaluation.enabled and experiment.evaluation.baselines):
        raise InputError("nothing to run: 'variables' and 'sample' (less 'exclude') and 'runs' define no point")
    named = [checkpoint for point in named for checkpoint in _get_checkpoints(experiment, point)]
    _check_epochs(experiment, named)
    _refuse_duplicates(named)
    return {point.name: point for point in named}


@dataclass(frozen=True)
class Baseline:
    """A model that is evaluated without training."""

    name: str
    """The name of its folder and of its row in the table."""
    model: Model
    is_base: bool = True
    """Whether it is the base model of points."""
    model_name: str | None = None
    """The name of a base model under `models`, if it has one."""
    tasks: tuple[str, ...] | None = None
    """Names of its tasks: those of the points of this base model; `None`: all."""

    @property
    def settings(self) -> dict[str, Any]:
        """What its manifest says of its model: the name under `models`, or the path if it is not a base model."""
        named = self.model_name if self.is_base else self.model.path
        return {MODE_KEY: "base", **({MODEL_KEY: named} if named else {})}


def get_baselines(experiment: Experiment, points: Mapping[str, Point]) -> dict[str, Baseline]:
    """Return the models that are evaluated without training, by name: the base model of each point, then the others.

    Base models are in the order of their names: that of points differs between the file and the record.

    Raises:
        InputError: A name is reserved, too long, or also the name of a point or of another baseline.
    """
    evaluation = experiment.evaluation
    if not evaluation.enabled:
        return {}
    evaluated = [point for point in points.values() if point.is_evaluated]
    bases = {point.model_name: point.model for point in evaluated}
    if not points and experiment.model.path:
        bases = {None: experiment.choose_model(None)}
    baselines = {}
    for key, base in sorted(bases.items(), key=lambda item: item[0] or "") if evaluation.baseline else ():
        name = get_baseline_name(key)
        if len(name) > LONGEST_NAME:
            raise InputError(
                f"models.{key}: its baseline cannot be named '{name}'",
                f"names of models that leave names of at most {LONGEST_NAME} characters",
            )
        tasks = _join_tasks(point for point in evaluated if point.model_name == key)
        baselines[name] = Baseline(name, get_evaluated_model(experiment, base), model_name=key, tasks=tasks)
    for index, baseline in enumerate(evaluation.baselines):
        is_taken = baseline.name in (*RESERVED_NAMES, *points, *baselines) or is_base(baseline.name)
        if is_taken or len(baseline.name) > LONGEST_NAME:
            raise InputError(
                f"evaluation.baselines.{index}.name: {baseline.name!r} is invalid",
                f"a name of at most {LONGEST_NAME} characters that differs from those of points, other baselines and "
                "files of the results",
            )
        # It is asked by its own template.
        own = {"path": os.path.normpath(baseline.model), "chat_template": None}
        other = Model.model_construct(**dict(experiment.model) | own)
        baselines[baseline.name] = Baseline(baseline.name, other, is_base=False)
    return baselines


def _join_tasks(points: Iterable[Point]) -> tuple[str, ...] | None:
    each = [point.tasks for point in points]
    if not each or None in each:
        return None
    return tuple(dict.fromkeys(name for tasks in each for name in tasks or ()))


def get_evaluated_model(experiment: Experiment, model: Model) -> Model:
    """Return a base model with the path from which evaluations read it: `evaluation.base_model`, if that is given."""
    path = experiment.evaluation.base_model
    return model.model_copy(update={"path": path}) if path else model


def record_points(points: Mapping[str, Point], registry: Path) -> None:
    """Record the settings of each name, and which points belong to the current sweep.

    Points that were removed from the experiment stay on record. The swept keys of a name are those that it was made
    of, so that the values in a name always match its settings.
    """
    recorded = read_record(registry, dict)
    record = {name: entry | {"current": False} for name, entry in recorded.items()}
    for point in points.values():
        record[point.name] = {
            "swept": recorded.get(point.name, {}).get("swept", sorted(point.swept)),
            "settings": point.settings,
            "model": point.model.model_dump(mode="json"),
            "data": point.data.model_dump(mode="json", exclude_defaults=True),
            "is_run": point.is_run,
            "is_evaluated": point.is_evaluated,
            **({} if point.tasks is None else {"tasks": list(point.tasks)}),
            "training": point.training,
            "current": True,
        }
    if record != recorded or not registry.is_file():
        write_record(registry, record)


def recall_points(experiment: Experiment, registry: Path) -> dict[str, Point]:
    """Return the current points from the record, for the jobs of a run. Ten times as fast as `get_points`."""
    entries = {name: entry for name, entry in read_record(registry, dict).items() if entry["current"]}
    owners: dict[str, str] = {}
    for name, entry in entries.items():
        if entry["training"] and "epoch" not in entry["settings"]:
            owners.setdefault(entry["training"], name)
    sections: dict[str, Data] = {}
    models: dict[str, Model] = {}
    points = {}
    for name, entry in entries.items():
        settings, training = entry["settings"], entry["training"]
        owner = owners.get(training)
        text = json.dumps(entry["data"])
        if text not in sections:
            sections[text] = Data.model_validate(entry["data"])
        model = json.dumps(entry["model"])
        if model not in models:
            models[model] = Model.model_validate(entry["model"])
        points[name] = Point(
            name=name,
            swept=tuple(entry["swept"]),
            # The values were checked before they were recorded.
            controls=Controls.model_construct(**settings),
            mode=settings[MODE_KEY],
            model=models[model],
            model_name=settings.get(MODEL_KEY),
            is_run=entry["is_run"],
            adapter=settings.get("adapter"),
            trainer=settings.get(TRAINER_KEY, DEFAULT_TRAINER),
            base=settings.get(BASE_KEY, "full"),
            data=sections[text],
            data_set=settings.get(SET_KEY),
            varied_files=tuple(key for key in DATA_KEYS if key in settings),
            training=training,
            trained_by=None if owner == name else owner,
            epoch=settings.get("epoch"),
            is_evaluated=entry["is_evaluated"],
            tasks=None if entry.get("tasks") is None else tuple(entry["tasks"]),
        )
    return points


def get_setting(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting of a point. For a trained point, a key that is omitted has its default value.

    Baselines and existing adapters have no controls and no data: the result is `None`.
    """
    return settings.get(key, _DEFAULTS.get(key) if "lora_rank" in settings else None)


def format_value(value: Any, key: str | None = None) -> str:
    """Return the value of a key as text for a name. Equal numbers give equal text; lists are joined by `+`.

    Without a key, a number is written in its shortest form.
    """
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return "+".join(format_value(item, key) for item in value)
    if isinstance(value, (int, float)):
        number = Decimal(repr(value)).normalize()
        plain = format(number, "f")
        digits, _, exponent = format(number, "e").partition("e")
        scientific = f"{digits}e{int(exponent)}" if number else plain
        return min(plain, scientific, key=len) if key is None else scientific if key in SCIENTIFIC_KEYS else plain
    if isinstance(value, dict):
        return str(value["regex"]) if value.keys() == {"regex"} else json.dumps(value, sort_keys=True)
    return str(value)


def _get_checkpoints(experiment: Experiment, point: Point) -> list[Point]:
    """Return the point, for its last or best epoch, and the checkpoints of earlier ones in `evaluation.epochs`."""
    if point.adapter:
        return [point]
    last, wanted = point.controls.epochs, experiment.evaluation.epochs
    if wanted == "best":
        return [point]
    epochs = [last] if wanted == "last" else list(range(1, last + 1)) if wanted == "all" else wanted
    earlier = [
        replace(point, name=get_checkpoint_name(point.name, epoch), epoch=epoch) for epoch in epochs if epoch < last
    ]
    return [replace(point, is_evaluated=last in epochs), *earlier]


def _check_epochs(experiment: Experiment, points: Sequence[Point]) -> None:
    wanted = experiment.evaluation.epochs
    trained = [point for point in points if not point.adapter and not point.epoch]
    if experiment.evaluation.validation_task and wanted != "best":
        raise InputError(
            f"evaluation.validation_task: does not go with evaluation.epochs: {wanted}, of which it chooses none",
            "evaluation.epochs: best; or no validation_task",
        )
    for point in trained:
        _check_best_epoch(experiment.evaluation, point)
    if not isinstance(wanted, list):
        return
    for point in trained:
        if wanted[0] > point.controls.epochs:
            raise InputError(
                f"evaluation.epochs: {wanted} has no epoch of '{point.name}', which is trained for "
                f"{point.controls.epochs}",
                "last, all, or numbers, at least one of which every point reaches",
            )
    most = max((point.controls.epochs for point in trained), default=0)
    if trained and wanted[-1] > most:
        raise InputError(
            f"evaluation.epochs: {wanted[-1]} is invalid: no point is trained for that many epochs",
            f"last, all, or numbers from 1 to {most}",
        )


def _check_best_epoch(evaluation: Evaluation, point: Point) -> None:
    if evaluation.keeps_best_by_loss and not point.data.validation:
        raise InputError(
            f"evaluation.epochs: 'best' is invalid without data.validation (point '{point.name}'): the best epoch has "
            "the lowest validation loss",
            "a file of held-out samples under data.validation; or a task under evaluation.validation_task; or last, "
            "all, or a list of epochs",
        )
    if point.controls.patience and evaluation.validation_task:
        raise InputError(
            f"controls.patience: {point.controls.patience} does not go with evaluation.validation_task (point "
            f"'{point.name}'), which scores the epochs when all are trained",
            "no patience; or no validation_task, so that the validation loss chooses the epoch",
        )
    if point.controls.patience and not evaluation.keeps_best_by_loss:
        raise InputError(
            f"controls.patience: {point.controls.patience} is invalid without evaluation.epochs: best (point "
            f"'{point.name}')",
            "evaluation.epochs: best; or no patience",
        )


def _parse_run(experiment: Experiment, index: int, run: Mapping[str, Any]) -> Point:
    where = f"runs.{index}"
    values = dict(run)
    name = values.pop("name", None)
    if not isinstance(name, str) or not _is_name(name):
        raise InputError(f"{where}.name: {name!r} is invalid", f"a name of {NAME_RULE}")
    override = values.pop("_override", {})
    if not isinstance(override, dict):
        raise InputError(f"{where}._override: {override!r} is invalid", "a mapping")
    tasks = values.pop("tasks", None)
    if tasks is not None and not (isinstance(tasks, list) and all(isinstance(task, str) for task in tasks)):
        raise InputError(f"{where}.tasks: {tasks!r} is invalid", "a list of names of tasks")
    adapter = values.pop("adapter", None)
    if adapter is not None:
        _check_adapter(adapter, [*values, *(["_override"] if override else [])], where)
        adapter = os.path.normpath(adapter)
    names, derived = experiment.names, find_derived(values)
    parsed = {key: parse_setting(key, v, f"{where}.{key}", names) for key, v in values.items() if key not in derived}
    if derived:
        point = _make_point(experiment, parsed)
        others = {key: text for key, text in experiment.derived.items() if key not in values}
        made = derive({**others, **derived}, {**vars(point.data), **vars(point.controls)}, where)
        parsed |= {
            key: parse_setting(key, made[key], f"{where}.{key} ({text})", names) for key, text in derived.items()
        }
    check_mode(parsed, where)
    check_set(experiment, parsed, where)
    point = replace(_make_point(experiment, parsed), adapter=adapter)
    if override:
        merged = _merge(point.controls.override, override)
        controls = parse_section(Controls, {**point.controls.model_dump(by_alias=True), "_override": merged})
        point = replace(point, controls=controls)
    return replace(point, name=name, is_run=True, tasks=None if tasks is None else tuple(tasks))


def _merge(keys: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping with `own` merged over it, and mappings within alike."""
    both = {key: (keys[key], own[key]) for key in own if key in keys}
    within = {key: _merge(*pair) for key, pair in both.items() if all(isinstance(value, dict) for value in pair)}
    return {**keys, **own, **within}


def _check_adapter(adapter: Any, keys: Sequence[str], where: str) -> None:
    """Check an existing adapter without reading its tensors, and the other `keys` of its run."""
    allowed = (MODEL_KEY, SET_KEY, "format", *PROMPT_KEYS, *CHECKPOINT_KEYS, BASE_KEY, MODE_KEY)
    trained = [key for key in keys if key not in allowed]
    if trained:
        raise InputError(
            f"{where}.{trained[0]}: is a training setting, but 'adapter' is not trained",
            f"beside 'adapter' only name, tasks, {', '.join(allowed)}",
        )
    expected = f"the path of a directory with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}"
    if not isinstance(adapter, str) or set(adapter) & set("*?[]{}\n"):
        raise InputError(f"{where}.adapter: {adapter!r} is invalid", expected)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not Path(adapter, name).is_file():
            raise InputError(f"{where}.adapter: no {name} in {adapter!r}", expected)


def _make_point(experiment: Experiment, values: dict[str, Any]) -> Point:
    own = {key: value for key, value in values.items() if key in Controls.model_fields}
    data = choose_data(experiment, values)
    for key, value in derive_controls(experiment, values, data).items():
        own[key] = parse_setting(key, value, f"controls.{key} ({experiment.derived[key]})", {})
    kept = [values.get(key, getattr(experiment.evaluation, key)) for key in CHECKPOINT_KEYS]
    return Point(
        name="",
        swept=tuple(dict.fromkeys(MODE_KEY if key in CHECKPOINT_KEYS else key for key in values)),
        controls=experiment.controls.model_copy(update=own),
        mode=values.get(MODE_KEY) or get_mode(*kept),
        model=experiment.choose_model(values.get(MODEL_KEY)),
        model_name=values.get(MODEL_KEY),
        trainer=experiment.choose_trainer(values),
        base=values.get(BASE_KEY, experiment.evaluation.base),
        data=data,
        data_set=values.get(SET_KEY),
    )


def _check_names(experiment: Experiment, points: Sequence[Point]) -> None:
    """Check that each set of data and each model has a point, or is a choice of `sample.space`, which may not be drawn;
    and that each point has a model."""
    said = {SET_KEY: ("data.sets", "data", "set"), MODEL_KEY: ("models", "model", "model")}
    used = {SET_KEY: {point.data_set for point in points}, MODEL_KEY: {point.model_name for point in points}}
    for key, names in experiment.names.items():
        drawn = experiment.sample.space.get(key) if experiment.sample else None
        section, what, one = said[key]
        for name in names:
            if name not in used[key] and name not in ((drawn and drawn.choices) or ()):
                raise InputError(
                    f"{section}.{name}: no point has this {what}",
                    f"variables: {{{key}: [{', '.join(names)}]}}, a run with {key}: {name}, or no such {one}",
                )
    if without := next((point for point in points if not point.model.path), None):
        raise InputError(
            f"model.path: is missing, and the point '{without.name}' has no model of 'models'",
            f"a checkpoint directory; or {MODEL_KEY} among the variables, or in the run",
        )
    if experiment.evaluation.base_model and experiment.models:
        raise InputError(
            f"evaluation.base_model: {experiment.evaluation.base_model!r} is invalid beside models",
            "null; each model is evaluated from its own path",
        )


def _make_name(point: Point) -> str:
    settings = point.settings
    parts = []
    for key in point.swept:
        text = format_value(settings.get(key), key)
        is_short = re.fullmatch(_VALUE, text) and len(text) <= _ABRIDGED and ".." not in text
        if key in (*Data.model_fields, "lora_modules") and not is_short:
            text = _abridge(text, text.rpartition("/")[2] if key in DATA_KEYS else text)
        if not re.fullmatch(_VALUE, text) or ".." in text:
            raise InputError(
                f"variables.{key}: {settings.get(key)!r} cannot be part of a file name",
                "letters, digits and . _ + - only; or a run under 'runs', which has its own name",
            )
        parts.append(f"{key}={text}")
    name = SEPARATOR.join(sorted(parts))
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: LONGEST_NAME - 9]}-{digest}"
    return name


def _abridge(text: str, shown: str) -> str:
    """Return a text abridged for a name: the beginning of its `shown` part, and a digest of the whole text."""
    begin = re.sub(r"[^A-Za-z0-9]+", "_", shown).strip("_")[:_ABRIDGED].rstrip("_")
    return f"{begin}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".lstrip("-")


class _NamesOnRecord:
    """The names of points in earlier runs, indexed by the points' values."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        self._recorded = {
            name: record | {"settings": {**record.get("data", {}), **record["settings"]}}
            for name, record in recorded.items()
        }
        self._by_swept: dict[tuple[str, ...], list[str]] = {}
        for name, record in self._recorded.items():
            if not record["is_run"] and "epoch" not in record["settings"]:
                self._by_swept.setdefault(tuple(record["swept"]), []).append(name)
        self._by_values: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, list[str]]] = {}

    def recall(self, point: Point) -> str | None:
        """Return the name of this point in earlier runs, or `None`.

        A recorded point is the same point if both agree in every key that either of them sweeps. All other keys are
        controls, and editing a control changes a point without making it another one. Of several matches, the closest
        is returned.
        """
        settings = json.loads(json.dumps({**vars(point.data), **point.settings}))

        def agreement(name: str) -> tuple[int, int, bool]:
            earlier = self._recorded[name]["settings"]
            same = sum(earlier.get(key) == value for key, value in settings.items())
            return same, len(self._recorded[name]["swept"]), sorted(point.swept) == self._recorded[name]["swept"]

        matches = []
        for swept in self._by_swept:
            keys = tuple(sorted({*point.swept, *swept}))
            matches += self._index(swept, keys).get(_key(settings, keys), [])
        return max(matches, key=agreement, default=None)

    def _index(self, swept: tuple[str, ...], keys: tuple[str, ...]) -> dict[str, list[str]]:
        """Return the names made of the keys `swept`, by the values of `keys`."""
        if (swept, keys) not in self._by_values:
            index: dict[str, list[str]] = {}
            for name in self._by_swept[swept]:
                index.setdefault(_key(self._recorded[name]["settings"], keys), []).append(name)
            self._by_values[swept, keys] = index
        return self._by_values[swept, keys]


def _key(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    return json.dumps([_as_number(get_setting(settings, key)) for key in keys])


def _as_number(value: Any) -> Any:
    """Convert integers to floats, so that 1 and 1.0 compare equal. Booleans are unchanged."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _refuse_duplicates(points: Sequence[Point]) -> None:
    names: set[str] = set()
    seen: dict[str, str] = {}
    for point in points:
        if point.name in RESERVED_NAMES or is_base(point.name):
            raise InputError(f"'{point.name}' is a reserved name", "another name")
        data = point.data.asked if point.adapter else point.data
        settings = vars(point.controls) | point.settings | vars(data)
        settings |= {key: sorted({*settings[key]}) for key in _SETS if isinstance(settings[key], list)}
        key = json.dumps(settings, sort_keys=True)
        if key in seen:
            hint = "; merge_adapters has no effect if model_format is hf" if point.mode == "A" else ""
            raise InputError(f"the points '{seen[key]}' and '{point.name}' are the same{hint}; remove or exclude one")
        seen[key] = point.name
        if point.name in names:
            raise InputError(f"two points are named '{point.name}'", "distinct names")
        names.add(point.name)


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(NAME_PATTERN, name)) and ".." not in name and len(name) <= LONGEST_NAME
