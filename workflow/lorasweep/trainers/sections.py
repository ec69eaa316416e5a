"""The sections that recipes of all trainers share: the tokenizer and the samples."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml

from lorasweep.checkpoints.chat_template import fix_date, has_date
from lorasweep.experiment.sections import Controls, Data, DataKey
from lorasweep.trainers import TrainingSpec
from lorasweep.util.errors import naming_key


def describe_tokenizer(spec: TrainingSpec) -> dict[str, Any]:
    """Return the arguments of `ChatTokenizer` for a training."""
    return {
        "path": str(spec.checkpoint.path),
        "max_seq_len": spec.controls.max_seq_len,
        **({} if spec.checkpoint.given_template is None else {"chat_template": spec.checkpoint.given_template}),
        **({"prompt_template": spec.data.prompt} if spec.data.prompt else {}),
        **_make_date(spec),
    }


def _make_date(spec: TrainingSpec) -> dict[str, str]:
    """Return the tokenizer's `template_date`, if a chat template is used that writes a date."""
    template = None if spec.data.format == "completion" else spec.checkpoint.chat_template
    if not template or not has_date(template):
        return {}
    with naming_key("model.path" if spec.checkpoint.given_template is None else "model.chat_template"):
        fix_date(template, spec.data.template_date)
    return {"template_date": spec.data.template_date}


def describe_samples(data: Data, key: DataKey) -> dict[str, Any]:
    """Return the arguments of `tokenize_samples` for the training or the validation samples."""
    files = data.get_files(key)
    return {
        "data_files": files[0] if len(files) == 1 else list(files),
        "format": data.format,
        "column_map": data.columns,
        "new_system_prompt": data.system_prompt,
        "train_on_input": data.train_on_input,
        **({"max_samples": data.max_samples} if data.max_samples and key == "train" else {}),
        "too_long": data.too_long,
    }


def get_files(recipe: Any, section: str) -> tuple[str, ...]:
    """Return the files of the samples that a section of a recipe describes; none if there is no such section."""
    files = recipe[section]["data_files"] if section in recipe else ()
    return (files,) if isinstance(files, str) else tuple(files)


def get_references(controls: Controls) -> dict[str, Any]:
    """Return what `${...}` in an override refers to beside the recipe: the controls, as `lr` and as `controls.lr`."""
    plain = {**controls.model_dump(exclude={"override"}), "gpus": controls.gpus, "lora_alpha": controls.alpha}
    return {**plain, "controls": plain}


def describe_best_epoch(spec: TrainingSpec) -> dict[str, Any]:
    """Return the section `best_epoch` of a recipe that keeps the epoch with the lowest validation loss."""
    return {"best_epoch": {"patience": spec.controls.patience}} if spec.keeps_best_epoch else {}


def dump_recipe(recipe: Mapping[str, Any]) -> str:
    """Return a recipe exactly as PyYAML's own dumper writes it: any other text would cause a new training.

    libyaml's dumper is ten times as fast. It differs in line separators and characters over U+FFFF, which it escapes.
    """
    return "".join(_dump_part(json.dumps([key, value])) for key, value in recipe.items())


@lru_cache(maxsize=10_000)
def _dump_part(pair: str) -> str:
    """Return the YAML of a key and its value, given as JSON. Cached, since most pairs recur in many recipes."""
    key, value = json.loads(pair)
    style: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 120}
    text = str(yaml.dump({key: value}, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **style))
    return str(yaml.safe_dump({key: value}, **style)) if re.search(r"\\[UN]", text) else text
