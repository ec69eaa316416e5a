"""Reading the experiment file into its sections, with messages for what does not fit them; and writing it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, TypeAdapter, ValidationError

from lorasweep.experiment.sections import (
    CHECKPOINT_KEYS,
    MODE_KEY,
    PROMPT_KEYS,
    SETTING_KEYS,
    Controls,
    Data,
    Evaluation,
    Experiment,
    Mode,
    Section,
)
from lorasweep.util.errors import InputError, nearest
from lorasweep.util.files import write_aside

_Section = TypeVar("_Section", bound=Section)


def read_given_values(config: Any, given: Any) -> Any:
    """Return the configuration with what was `given` on the command line read as YAML.

    Snakemake reads `--config 'evaluation={enabled: false}'` into a mapping, and leaves every value in it as text.
    """
    if isinstance(config, Mapping) and isinstance(given, Mapping):
        return {key: read_given_values(value, given[key]) if key in given else value for key, value in config.items()}
    if isinstance(given, list):
        return [read_given_values(value, value) for value in given]
    try:
        return yaml.safe_load(given) if isinstance(given, str) else config
    except yaml.YAMLError as error:
        raise InputError(
            f"--config: {given!r} is not accepted: {str(error).splitlines()[0]}; accepted: YAML"
        ) from error


def load_experiment(config: Mapping[str, Any], source: str) -> Experiment:
    """Read an experiment from the plain mapping that Snakemake made of the file and of `--config`.

    `source` names the file in messages. `${...}` is resolved everywhere but in `controls._override`, whose
    interpolations refer to the recipe and are resolved when that is built.

    Raises:
        InputError: with one line for each thing that is wrong.
    """
    plain = dict(config)
    override: dict[str, Any] = {}
    if isinstance(plain.get("controls"), Mapping):
        plain["controls"] = dict(plain["controls"])
        if "_override" in plain["controls"]:
            override = {"_override": plain["controls"].pop("_override")}
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    except OmegaConfBaseException as error:
        raise InputError(f"{source}: {str(error).splitlines()[0]} (key: {error.full_key})") from error
    if override:
        resolved["controls"] |= override
    return parse_section(Experiment, resolved, source)


def write_experiment(experiment: Experiment, file: Path) -> None:
    """Write an experiment as it was read, with every key; the file is one that can be run again."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(
        file, yaml.safe_dump(experiment.model_dump(by_alias=True), sort_keys=False, allow_unicode=True, width=120)
    )


def parse_setting(key: str, value: Any, source: str, where: str) -> Any:
    """Check one value of a variable or a run, and return it as the type that the key has in its section.

    Raises:
        InputError: unknown key (with the nearest known one), or a value that the key does not take.
    """
    if key not in SETTING_KEYS:
        raise InputError(
            f"{source}: {where}: unknown key '{key}'{nearest(key, SETTING_KEYS)}; accepted: {', '.join(SETTING_KEYS)}"
        )
    section: type[Section] = Evaluation if key in CHECKPOINT_KEYS else Data if key in PROMPT_KEYS else Controls
    try:
        if key == MODE_KEY:
            return TypeAdapter(Mode).validate_python(value)
        return getattr(section.model_validate({key: value}), key)
    except ValidationError as error:
        raise InputError("\n".join(f"{source}: {where}: {_said(e)}" for e in error.errors())) from error


def parse_section(section: type[_Section], values: Any, source: str) -> _Section:
    """Validate `values`, with errors that name the file, the key, the value and what is accepted."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                known = _known_keys(section, item["loc"][:-1])
                word = str(item["loc"][-1])
                lines.append(f"{source}: unknown key '{key}'{nearest(word, known)}; accepted: {', '.join(known)}")
            elif item["type"] == "missing":
                lines.append(f"{source}: the key '{key}' is missing")
            else:
                lines.append(f"{source}: {key}: {_said(item)}")
        raise InputError("\n".join(lines)) from error


def _said(error: Any) -> str:
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{error['input']!r} is not accepted; accepted: {expected}"


def _known_keys(section: type[BaseModel], loc: tuple[str | int, ...]) -> list[str]:
    """The keys of the section that an error's location lies in; list indices in it are passed over."""
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
