"""Compute the sizes in bytes of files that a sweep writes, before it runs.

Sizes of weights are exact. A safetensors file consists of 8 bytes, a JSON header padded to a multiple of 8, and the
values (https://github.com/huggingface/safetensors). Names and shapes follow from the base model and the settings.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from math import prod

from lorasweep.checkpoints.checkpoint import SINGLE, Checkpoint
from lorasweep.checkpoints.dtypes import BYTES, PRECISIONS
from lorasweep.checkpoints.lora import get_shape_settings, list_adapter_tensors
from lorasweep.experiment.sections import Controls

SMALL_FILES = 8_000
"""Approximate size in bytes of a point's recipe, configuration, records and manifest."""

LOG_ROW = 45
"""Approximate size in bytes of a row of `training_log.csv`."""


def get_safetensors_size(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> int:
    """Return the size in bytes of a safetensors file with tensors in this order, all of `dtype`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": PRECISIONS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + offset


def get_adapter_size(base: Checkpoint, controls: Controls, dtype: str) -> int:
    """Return the size in bytes of `adapter_model.safetensors`, all of `dtype`."""
    return _get_adapter_size(base, get_shape_settings(controls), dtype)


@lru_cache
def _get_adapter_size(base: Checkpoint, settings: str, dtype: str) -> int:
    tensors = list_adapter_tensors(base, Controls.model_validate_json(settings))
    return get_safetensors_size(dict(sorted(tensors.items())), dtype)


def get_model_size(base: Checkpoint, dtype: str) -> int:
    """Return the size in bytes of a full model's weights in `dtype`, sharded like the base model."""
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in base.tensors.items():
        shards.setdefault(tensor.shard, {})[name] = tensor.shape
    return sum(get_safetensors_size(shapes, dtype) for shapes in shards.values())


def get_tokenizer_size(base: Checkpoint) -> int:
    """Return the size in bytes of the tokenizer's files, which every adapter and full model contains."""
    return sum((base.path / name).stat().st_size for name in base.tokenizer_files)


def get_model_folder_size(base: Checkpoint, dtype: str) -> int:
    """Return the size in bytes of a full model's folder: weights, configuration, index, tokenizer and record."""
    index = sum(len(name) + len(tensor.shard) + 10 for name, tensor in base.tensors.items())
    beside = [base.path / name for name in ("config.json", *base.companions)]
    small = sum(file.stat().st_size for file in beside if file.is_file())
    is_sharded = base.shards != (SINGLE,)
    return get_model_size(base, dtype) + get_tokenizer_size(base) + small + index * is_sharded + 1_000
