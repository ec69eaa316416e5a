"""The trainer `trl`: trains any causal language model that transformers loads, by TRL's `SFTTrainer` and PEFT.

Other modules use this package only as a `lorasweep.trainers.Trainer`. No module outside it imports trl.
"""

from lorasweep.trainers.trl.recipe import count_positions, declared_adapter_only, recipe
from lorasweep.trainers.trl.run import (
    CAN_PAUSE,
    KEEPS_BEST_EPOCH,
    STAGE,
    TAKES_CHAT_TEMPLATE,
    find_faults,
    measure_lengths,
    train,
)

__all__ = [
    "CAN_PAUSE",
    "KEEPS_BEST_EPOCH",
    "STAGE",
    "TAKES_CHAT_TEMPLATE",
    "count_positions",
    "declared_adapter_only",
    "find_faults",
    "measure_lengths",
    "recipe",
    "train",
]
