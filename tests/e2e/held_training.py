"""A torchtune builder whose training something happens to at a step, as the environment says.

LORASWEEP_AT_STEP is `STEP:tell`, and the training is told to end; or `STEP:FILE`, and it waits until that is there.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from torchtune.models.llama3 import lora_llama3

from lorasweep.trainers.torchtune import loop as torchtune_recipe


def build(**arguments: Any) -> Any:
    step, _, what = os.environ.get("LORASWEEP_AT_STEP", "").partition(":")
    count = torchtune_recipe.Recipe._count_tokens

    def count_tokens(self: Any, batch: Any) -> Any:
        if step and self.global_step == int(step):
            _let_happen(what)
        return count(self, batch)

    torchtune_recipe.Recipe._count_tokens = count_tokens
    return lora_llama3(**arguments)


def _let_happen(what: str) -> None:
    if what == "tell":
        os.kill(os.getpid(), signal.SIGTERM)
    while what != "tell" and not Path(what).exists():
        time.sleep(0.1)
