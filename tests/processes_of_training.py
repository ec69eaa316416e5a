"""A torchtune builder for trainings in several processes: it begins with the same adapter in however many of them, and
something may happen to one of them.

The environment says what: LORASWEEP_HAPPENS is `WHAT:RANK:STEP`, LORASWEEP_SAVE_EVERY a number of steps.
"""

import os
import signal
import time
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import LoRALinear

from lorasweep.trainers.torchtune import loop as torchtune_recipe


def build(**arguments: Any) -> Any:
    LoRALinear.initialize_parameters = _initialize
    recipe = torchtune_recipe.DistributedRecipe if os.environ.get("RANK") else torchtune_recipe.Recipe
    every = int(os.environ.get("LORASWEEP_SAVE_EVERY", "1000"))
    recipe._is_due = lambda self: self.global_step % every == 0
    what, rank, step = os.environ.get("LORASWEEP_HAPPENS", "nothing:0:0").split(":")
    if what == "tell while loading":
        _let_happen("tell")
        time.sleep(60)
    if rank == os.environ.get("RANK", "0"):
        count = recipe._count_tokens

        def count_tokens(self: Any, batch: Any) -> Any:
            if self.global_step == int(step):
                _let_happen(what)
            return count(self, batch)

        recipe._count_tokens = count_tokens
    return lora_llama3(**arguments)


def _initialize(self: Any) -> None:
    """A is what it would be in one process alone, and B zero."""
    weight = self.lora_a.weight
    whole = torch.empty(weight.shape)
    if not whole.is_meta:
        nn.init.kaiming_uniform_(whole, a=5**0.5, generator=torch.Generator().manual_seed(weight.numel()))
    if isinstance(weight, DTensor):
        whole = distribute_tensor(whole, weight.device_mesh, weight.placements)
    with torch.no_grad():
        weight.copy_(whole)
        self.lora_b.weight.zero_()


def _let_happen(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "tell":  # the job
        os.kill(os.getppid() if os.environ.get("RANK") else os.getpid(), signal.SIGTERM)
    elif what == "run out":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a capacity of 1 GiB.")
