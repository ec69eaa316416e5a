"""The trainer `torchtune`: makes recipes for torchtune 0.6.1, its last release, from settings, and runs them.

Other modules use this package only as a `lorasweep.trainers.Trainer`. No module outside it imports torchtune.
"""

from lorasweep.trainers.torchtune.recipe import count_positions, declared_adapter_only, recipe
from lorasweep.trainers.torchtune.run import (
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
