"""The models of Inspect's roles, such as the grader of a model-graded task: which are local, and what is refused."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from lorasweep.experiment.sections import Evaluation, ModelRole
from lorasweep.util.errors import InputError

LOCAL_PROVIDERS = ("hf", "lorasweep", "mockllm")
"""Inspect's providers whose models a job loads itself. All others are asked over the network."""

_SECRET = re.compile(
    r"(^|_)((api|access|secret|private|account)_?key(_id)?|token|secret|password|authorization|credentials?)$"
)
"""The end of a name whose value is a secret, in lower case with `_` for `-`."""


def is_local(model: str) -> bool:
    """Whether a job loads the model of this name itself."""
    return model.partition("/")[0] in LOCAL_PROVIDERS


def get_folders(model: str, args: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the folders of a local model: its checkpoint, and the adapter on it."""
    provider, _, name = model.partition("/")
    if provider == "hf":
        return args.get("model_path") or name, None
    if provider == "lorasweep":
        return args.get("base"), args.get("adapter")
    return None, None


def check_roles(evaluation: Evaluation) -> None:
    """Check what can be known of the roles' models from the file alone.

    Raises:
        InputError: A name is not Inspect's, the file holds a secret, or the network is needed and not allowed.
    """
    for name, role in evaluation.model_roles.items():
        where = f"evaluation.model_roles.{name}"
        provider, _, rest = role.model.partition("/")
        if not provider or not rest:
            raise InputError(f"{where}: {role.model!r} is invalid", "Inspect's name of a model: <provider>/<name>")
        for key in _find_secrets({"config": role.config, "args": role.args}):
            raise InputError(
                f"{where}.{key}: a secret does not belong in the file",
                f"the environment variable that Inspect's provider {provider!r} reads",
            )
        if role.base_url and "@" in urlsplit(role.base_url).netloc:
            raise InputError(
                f"{where}.base_url: a secret does not belong in the file", "a URL without user and password"
            )
        if is_local(role.model):
            _check_local(role, where, evaluation)
        elif not evaluation.allow_network:
            raise InputError(
                f"{where}: {role.model!r} is asked over the network",
                f"evaluation.allow_network: true, or a local model ({', '.join(f'{p}/...' for p in LOCAL_PROVIDERS)})",
            )


def _check_local(role: ModelRole, where: str, evaluation: Evaluation) -> None:
    if role.base_url:
        raise InputError(f"{where}.base_url: {role.base_url!r} does not go with a local model", "no base_url")
    if role.model.startswith("mockllm/"):
        return
    folder, adapter = get_folders(role.model, role.args)
    if not isinstance(folder, str) or not isinstance(adapter, str | None):
        raise InputError(f"{where}.args: {role.args!r} is invalid", "base: the folder of a checkpoint")
    if evaluation.backend == "vllm":
        raise InputError(
            f"{where}: {role.model!r} does not go with evaluation.backend: vllm, whose environment cannot load it",
            "backend: hf, or the name of a model on a server",
        )


def _find_secrets(values: Any, path: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for key, value in values.items():
            inner = f"{path}.{key}".lstrip(".")
            if value is not None and _SECRET.search(str(key).lower().replace("-", "_")):
                yield inner
            yield from _find_secrets(value, inner)
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _find_secrets(value, f"{path}.{index}")
