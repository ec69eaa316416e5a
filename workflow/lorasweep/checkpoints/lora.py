"""Find the weights that get an adapter, and count the adapter's parameters."""

from collections.abc import Mapping
from functools import lru_cache

from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.experiment.sections import Controls

# Hugging Face's names of the modules that LoRA adapts.
_MLP = ("gate_proj", "up_proj", "down_proj")

_ATTENTION = {"output_proj": "o_proj"}


def find_lora_targets(checkpoint: Checkpoint, controls: Controls) -> Mapping[str, tuple[int, int]]:
    """Return the shapes [out, in] of the weights that get an adapter, by name."""
    targets = {_ATTENTION.get(name, name) for name in controls.lora_attn_modules}
    targets |= set(_MLP) if controls.apply_lora_to_mlp else set()
    targets |= {"lm_head"} if controls.apply_lora_to_output else set()
    return _find_weights(checkpoint, frozenset(targets))


@lru_cache
def _find_weights(checkpoint: Checkpoint, modules: frozenset[str]) -> Mapping[str, tuple[int, int]]:
    return {
        name: (tensor.shape[0], tensor.shape[1])
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and name.split(".")[-2] in modules
    }


def count_lora_parameters(checkpoint: Checkpoint, controls: Controls) -> int:
    """Return the number of parameters of the adapter: r · (in + out) for each adapted weight of shape [out, in]."""
    return controls.lora_rank * sum(map(sum, find_lora_targets(checkpoint, controls).values()))
