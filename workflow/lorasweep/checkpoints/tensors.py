"""Read the values of tensors in safetensors files."""

from math import prod
from pathlib import Path

import torch

from lorasweep.checkpoints.checkpoint import Tensor
from lorasweep.checkpoints.dtypes import PRECISIONS
from lorasweep.util.errors import InputError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Torch's floating point types, by safetensors' names."""


def get_torch_name(precision: str) -> str:
    """Return torch's name of one of `PRECISIONS`, such as `bfloat16`."""
    return str(DTYPES[PRECISIONS[precision]]).removeprefix("torch.")


def read_tensor(folder: Path, tensor: Tensor) -> torch.Tensor:
    """Read one tensor of floating point values into memory.

    Raises:
        InputError: The file ends before the end of the tensor.
    """
    content = bytearray(tensor.size)
    with (folder / tensor.shard).open("rb") as file:
        file.seek(tensor.offset)
        if file.readinto(content) != tensor.size:
            raise InputError(f"'{folder / tensor.shard}' was truncated while it was read; fetch it again")
    if not prod(tensor.shape):
        return torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    return torch.frombuffer(content, dtype=DTYPES[tensor.dtype]).view(tensor.shape)
