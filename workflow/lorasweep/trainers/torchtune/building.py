"""Build what recipes name, as far as that needs no weights, to find before any training what fails.

The optimizer gets a tiny parameter, and the model has one layer on torch's device `meta`, which has no memory. What
reads data or weights or writes files when it is built is imported, and its arguments are compared with its signature.
"""

import inspect
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torchtune import config as components
from torchtune import training
from torchtune.config._utils import _get_component_from_path
from torchtune.training.checkpointing import ModelType
from torchtune.training.precision import PRECISION_STR_TO_DTYPE

from lorasweep.util.errors import describe

_GIVEN = {"tokenizer": 0, "checkpointer": 0, "dataset": 1, "dataset_val": 1, "metric_logger": 0, "profiler": 0}
"""Sections whose components are not built, with the number of arguments that torchtune adds to the recipe's."""

_STEPS = 100
"""Number of steps that a schedule is built for."""


def find_faults(recipe: str) -> dict[str, str]:
    """Return why parts of a recipe cannot be built, by section; empty if nothing is wrong."""
    config = yaml.safe_load(recipe)
    text = {name: json.dumps(section) for name, section in config.items()}
    faults: dict[str, str] = {}

    def attempt(section: str, build: Any, *arguments: Any) -> None:
        try:
            build(*arguments)
        except Exception as error:
            faults.setdefault(section, describe(error))

    for name, section in config.items():
        for path in _list_components(section):
            attempt(name, _find, path)
        if name in _GIVEN and isinstance(section, dict):
            attempt(name, _match, text[name], _GIVEN[name])
    if "collate_fn" in config:
        attempt("collate_fn", _find, config["collate_fn"])
    attempt("checkpointer", _find_model_type, config["checkpointer"].get("model_type"))
    attempt("model", _build_model, text["model"], config["dtype"])
    attempt("tokenizer", _build, text["tokenizer"])
    attempt("loss", _build, text["loss"])
    attempt("optimizer", _build_optimizer, text["optimizer"])
    if "optimizer" not in faults:
        attempt("lr_scheduler", _build_schedule, text["lr_scheduler"], text["optimizer"])
    return faults


def _list_components(value: Any) -> Iterator[str]:
    """Yield the paths under `_component_` in a section, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("_component_"), str):
            yield value["_component_"]
        for part in value.values():
            yield from _list_components(part)
    elif isinstance(value, list):
        for part in value:
            yield from _list_components(part)


@cache
def _find(path: str) -> Any:
    return _get_component_from_path(path)


@cache
def _match(section: str, given: int) -> None:
    """Compare a component's arguments with its signature.

    Raises:
        TypeError: an argument is unknown or missing.
    """
    arguments = json.loads(section)
    component = _find(arguments.pop("_component_", ""))
    arguments.pop("cache_dir", None)
    try:
        inspect.signature(component).bind(*[None] * given, **arguments)
    except TypeError as error:
        raise TypeError(f"{component.__name__}: {error}") from None


def _find_model_type(name: str | None) -> None:
    if name not in ModelType.__members__:
        raise ValueError(f"{name!r} is no model_type of torchtune's, which are {', '.join(ModelType.__members__)}")


@cache
def _build(section: str) -> Any:
    return components.instantiate(OmegaConf.create(json.loads(section)))


@cache
def _build_model(section: str, dtype: str) -> None:
    model = json.loads(section)
    if "num_layers" in model:
        model["num_layers"] = min(1, model["num_layers"])
    # Not torchtune's own look-up, which refuses what this machine has no hardware for.
    with training.set_default_dtype(PRECISION_STR_TO_DTYPE[dtype]), torch.device("meta"):
        try:
            components.instantiate(OmegaConf.create(model))
        except NotImplementedError as error:
            if "meta" not in str(error):  # a builder that computes with its tensors cannot be tried so
                raise


@cache
def _build_optimizer(section: str) -> Any:
    return components.instantiate(OmegaConf.create(json.loads(section)), [torch.nn.Parameter(torch.zeros(1))])


@cache
def _build_schedule(section: str, optimizer: str) -> None:
    components.instantiate(
        OmegaConf.create(json.loads(section)), _build_optimizer(optimizer), num_training_steps=_STEPS, last_epoch=-1
    )
