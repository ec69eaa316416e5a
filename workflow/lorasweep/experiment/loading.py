"""Read the experiment file into its sections, with messages for invalid values, and write it."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import date
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError

from lorasweep.experiment.interpolation import explain, find_derived
from lorasweep.experiment.sections import (
    BASE_KEY,
    CHECKPOINT_KEYS,
    DATA_KEYS,
    MODE_KEY,
    MODEL_KEY,
    OTHER_NAMES,
    SET_KEY,
    SETTING_KEYS,
    TRAINER_KEY,
    Controls,
    Data,
    Evaluation,
    Experiment,
    Mode,
    Section,
    Text,
)
from lorasweep.util.errors import InputError, naming_file, nearest
from lorasweep.util.files import write_aside

_Section = TypeVar("_Section", bound=Section)


_OTHER_THAN_TEXT = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float")}


def read_overrides(config: Any, overrides: Any) -> Any:
    """Return the configuration with the values of `overrides`, as set on the command line: numbers, booleans and null
    as YAML reads them, and text as it is.

    Snakemake parses `--config 'evaluation={enabled: false}'` into a mapping, and leaves its values as text.
    """
    if isinstance(config, Mapping) and isinstance(overrides, Mapping):
        return {
            key: read_overrides(value, overrides[key]) if key in overrides else value for key, value in config.items()
        }
    if isinstance(overrides, list):
        return [read_overrides(value, value) for value in overrides]
    if not isinstance(overrides, str):
        return config
    if overrides[:1] in ("'", '"') and overrides[1:].endswith(overrides[0]):
        return overrides[1:-1]
    tag = yaml.SafeLoader("").resolve(yaml.ScalarNode, overrides, (True, False))  # type: ignore[no-untyped-call]
    return yaml.safe_load(overrides) if tag in _OTHER_THAN_TEXT else overrides


def read_config(file: Path) -> dict[str, Any]:
    """Return an experiment file as a plain mapping.

    Snakemake reads the file itself, and would keep the last of several values of a key without a word. So the process
    that plans a run calls this for the messages alone.

    Raises:
        InputError: The file is missing, is not YAML (the message has line and column), or has a key twice.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file", "an experiment's file, such as config/experiment.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=loader)
        content = yaml.load(text, Loader=loader)
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text ({error.reason} at byte {error.start + 1})", file=file) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise _refuse_yaml(file, error) from error
    if not isinstance(content, dict):
        raise InputError("not an experiment", "YAML with the keys of config/README.md", file=file)
    if node and (duplicates := sorted(_find_duplicates(node, set()))):
        raise InputError.join(
            InputError(f"the key '{key}' is there twice, first in line {first}", "each key once", file=f"{file}:{line}")
            for line, key, first in duplicates
        )
    return content


def _refuse_yaml(file: Path, error: Exception) -> InputError:
    mark = getattr(error, "problem_mark", None)
    problem = ", ".join(filter(None, [getattr(error, "context", None), getattr(error, "problem", None)]))
    place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
    return InputError(f"not YAML: {problem or error}", file=place)


def _find_duplicates(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str, int]]:
    """Yield the keys that a mapping has twice: the line of the second, the key, and the line of the first."""
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:  # an anchored node stands in several places
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for item in node.value:
        key, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                yield line, key.value, lines[name]
            lines.setdefault(name, line)
        yield from _find_duplicates(value, seen)


def load_experiment(config: Mapping[str, Any], source: str) -> Experiment:
    """Read an experiment from the plain mapping into which Snakemake merges the file and `--config`.

    `source` names the file in messages. `${...}` is resolved everywhere except in `_override`, also a run's own, whose
    interpolations refer to the recipe and are resolved when the recipe is built, and where it stands in `controls` or
    in a run for another setting of the same point.

    Raises:
        InputError: A value is invalid. The message has one line per problem.
    """
    with naming_file(source):
        experiment = _parse_experiment(_read_plain(config))
        if not experiment.model.path and not experiment.models:
            raise InputError("the key 'model.path' is missing")
        return experiment


_ARGUMENTS = {"args", "solver_args", "scorer_args", "config"}
"""Keys of what is handed over as JSON, which has no word for numbers that are not finite."""


def _read_plain(value: Any, path: tuple[str, ...] = ()) -> Any:
    """Return a value of the file, checked for what YAML has and no key takes. Dates are `template_date`'s alone.

    Recipes, records and tasks would get another value, or none.
    """
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{'.'.join((*path, str(key)))}: the key {key!r} is not text", "the key in quotes")
        return {key: _read_plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_read_plain(item, (*path, str(index))) for index, item in enumerate(value)]
    where = ".".join(path)
    if isinstance(value, date):
        if "template_date" in path:
            return value.isoformat()
        raise InputError(f"{where}: {value} is a date", f"text in quotes: '{value}'")
    if value is not None and not isinstance(value, str | int | float):
        raise InputError(
            f"{where}: {value!r} is invalid", "text, a number, true, false, null, a list or a mapping, as YAML has them"
        )
    if isinstance(value, float) and not isfinite(value) and _ARGUMENTS & {*path}:
        raise InputError(f"{where}: {value} is invalid", "a finite number; or text in quotes")
    return value


def _parse_experiment(plain: dict[str, Any]) -> Experiment:
    if "${" not in json.dumps(plain):  # OmegaConf takes seconds for tens of thousands of values
        return parse_section(Experiment, plain)
    override: dict[str, Any] = {}
    derived: dict[str, str] = {}
    if isinstance(plain.get("controls"), Mapping):
        controls = plain["controls"]
        derived = {key: text for key, text in find_derived(controls).items() if key in Controls.model_fields}
        override = {"_override": controls["_override"]} if "_override" in controls else {}
        plain["controls"] = {key: value for key, value in controls.items() if key not in {*derived, *override}}
    runs = plain["runs"] if isinstance(plain.get("runs"), list) else []
    own: list[dict[str, Any]] = [
        find_derived(run) | {key: run[key] for key in ("_override",) if key in run} if isinstance(run, Mapping) else {}
        for run in runs
    ]
    for index, texts in enumerate(own):
        for key in DATA_KEYS:
            if texts.get(key, "").startswith("hf:"):
                raise InputError(f"runs.{index}.{key}: {texts[key]!r} is invalid", "a file on the hub without ${...}")
    if any(own):
        plain["runs"] = [
            {**run, **dict.fromkeys(texts)} if texts else run for run, texts in zip(runs, own, strict=True)
        ]
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    if override:
        resolved["controls"] |= override
    for run, texts in zip(resolved.get("runs") or (), own, strict=False):
        if texts:
            run |= texts
    return parse_section(Experiment, resolved).with_derived(derived)


def write_experiment(experiment: Experiment, file: Path) -> None:
    """Write an experiment with all its keys, as a file that can be run again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(
        file, yaml.safe_dump(experiment.model_dump(by_alias=True), sort_keys=False, allow_unicode=True, width=120)
    )


_NAMED = {SET_KEY: "data.sets", MODEL_KEY: "models"}
"""Where what a variable chooses by name is described."""


def parse_setting(key: str, value: Any, where: str, names: Mapping[str, Collection[str]]) -> Any:
    """Check one value of a variable or a run, and return it converted to the key's type.

    `names` are those that a key can choose from, as `Experiment.names`.

    Raises:
        InputError: The key is unknown (the message suggests the nearest one), or its value is invalid.
    """
    if key not in SETTING_KEYS:
        if OTHER_NAMES.get(key, key) == "model.path":
            raise InputError(f"{where}: unknown key '{key}' (did you mean 'model'?)", "model, with names under models")
        raise InputError(f"{where}: unknown key '{key}'{suggest(key, SETTING_KEYS)}", ", ".join(SETTING_KEYS))
    if key in _NAMED:
        if value not in [*names[key]]:
            near = nearest(value, names[key]) if isinstance(value, str) else ""
            expected = ", ".join(names[key]) or f"a name, described by {_NAMED[key]}"
            raise InputError(f"{where}: {value!r} is invalid{near}", expected)
        return value
    section: type[Section] = (
        Evaluation if key in (*CHECKPOINT_KEYS, BASE_KEY) else Data if key in Data.model_fields else Controls
    )
    try:
        if key in (MODE_KEY, TRAINER_KEY):
            return TypeAdapter(Mode if key == MODE_KEY else Text).validate_python(value, strict=True)
        return getattr(section.model_validate({key: value}), key)
    except ValidationError as error:
        raise InputError.join(_refuse(where, item) for item in error.errors()) from error


def suggest(key: str, known: Sequence[str]) -> str:
    """Return what may be meant by an unknown key: its part after a dot, the name here of another tool's key, or the
    nearest one."""
    last = key.rpartition(".")[2]
    here = f".{last}" if last != key and last in known else OTHER_NAMES.get(key)
    if here is None:
        return nearest(key, known)
    own = here.rpartition(".")[2]
    return f" (did you mean '{own}'?)" if own in known else f" (here it is '{here}')"


def parse_section(section: type[_Section], values: Any) -> _Section:
    """Validate `values` and return the section. Errors name the key, the value and what is expected."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                keys = _known_keys(section, item["loc"][:-1])
                problems.append(
                    InputError(f"unknown key '{key}'{suggest(str(item['loc'][-1]), keys)}", ", ".join(keys))
                )
            elif item["type"] == "missing":
                problems.append(InputError(f"the key '{key}' is missing"))
            else:
                problems.append(_refuse(key, item))
        raise InputError.join(problems) from error


def _refuse(key: str, error: Any) -> InputError:
    """Convert an error of pydantic to an InputError."""
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "model_type":
        expected = "a section, with keys of its own"
    return InputError(f"{key}: {error['input']!r} is invalid", expected)


def _known_keys(section: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """Return the keys of the section in which an error's location lies. List indices in it are skipped."""
    for part in loc:
        for field in section.model_fields.values():
            for candidate in (field.annotation, *_arguments(field.annotation)):
                if (
                    isinstance(candidate, type)
                    and issubclass(candidate, Section)
                    and section.model_fields.get(str(part)) is field
                ):
                    section = candidate
    return [field.alias or name for name, field in section.model_fields.items()]


def _arguments(annotation: Any) -> list[Any]:
    return [leaf for argument in get_args(annotation) for leaf in (argument, *_arguments(argument))]
