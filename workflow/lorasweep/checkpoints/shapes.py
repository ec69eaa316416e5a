"""Derive the tensors of a model from its `config.json`, without its weights."""

import json
from math import prod
from pathlib import Path

from lorasweep.checkpoints.architecture import describe
from lorasweep.checkpoints.checkpoint import SINGLE, TOKENIZER_FILES, Checkpoint, Tensor, find_files
from lorasweep.checkpoints.dtypes import BITS, TORCH_NAMES


def read_shape(path: Path) -> Checkpoint:
    """Return the checkpoint that a `config.json` in a directory describes, for computing sizes.

    It has tensors with their shapes, as transformers saves them, but no weights.

    Raises:
        InputError: `config.json` cannot be read, transformers does not know or cannot build the model, or the
            evaluation environment is not installed.
    """
    stored = describe(path).stored
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    dtype = TORCH_NAMES.get(str(config.get("dtype") or config.get("torch_dtype")), "BF16")
    tensors = {
        name: Tensor(SINGLE, dtype, shape, 0, prod(shape) * BITS[dtype] // 8) for name, shape in sorted(stored.items())
    }
    return Checkpoint(path, config, (SINGLE,), tensors, find_files(path, TOKENIZER_FILES))
