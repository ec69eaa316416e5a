"""Values that are made of other settings of the same point, as `lora_alpha: ${lora_rank}` under `controls`."""

import re
from collections.abc import Mapping
from typing import Any

from omegaconf.errors import OmegaConfBaseException

from lorasweep.experiment.sections import Controls, Data
from lorasweep.util.errors import InputError, nearest

NAMES = (*(key for key in Controls.model_fields if key != "override"), *Data.model_fields)
"""The settings that a value can be made of."""

_REFERENCE = re.compile(r"\$\{\s*(?:controls\.|\.)?(\w+)\s*\}")
_MISSING = re.compile(r"Interpolation key '(.+)' not found")


def find_derived(section: Mapping[str, Any]) -> dict[str, str]:
    """Return the values of a section of settings that are made of settings alone, each written as `${key}`."""
    derived = {}
    for key, value in section.items():
        if isinstance(value, str) and "${" in value:
            names = _REFERENCE.findall(value)
            if len(names) == value.count("${") and set(names) <= {*NAMES}:
                derived[str(key)] = _REFERENCE.sub(r"${\1}", value)
    return derived


def derive(derived: Mapping[str, str], settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values of `derived` for a point with these settings. They can be made of each other.

    Raises:
        InputError: A value is made of itself. `where` names the section.
    """

    def find(name: str, users: tuple[str, ...]) -> Any:
        if name not in derived:
            return settings[name]
        text = derived[name]
        if name in users:
            raise InputError(f"{where}.{name}: {text!r} is made of itself", "keys with values of their own")
        if whole := _REFERENCE.fullmatch(text):
            value = find(whole[1], (*users, name))
            # A whole number may be that of a key whose values are floats.
            return int(value) if isinstance(value, float) and value.is_integer() else value
        return _REFERENCE.sub(lambda part: str(find(part[1], (*users, name))), text)

    return {key: find(key, ()) for key in derived}


def explain(error: OmegaConfBaseException) -> InputError:
    """Return what is wrong with an interpolation: the key that has it, and the key that does not exist."""
    problem = str(error).splitlines()[0]
    missing = _MISSING.match(problem)
    name = missing[1].rpartition(".")[2] if missing else ""
    is_known = name in NAMES
    only = f"a key with one value for all points; only in 'controls' and runs is ${{{name}}} a point's own value"
    expected = only if is_known else ""
    return InputError(f"{problem}{'' if is_known else nearest(name, NAMES)} (key: {error.full_key})", expected)
