"""The trainer `torchtune`: recipes of torchtune 0.6.1, its last release, are made of settings, and run.

What other modules use of it is `lorasweep.trainers.Trainer`; nothing outside of this package imports torchtune.
"""

from lorasweep.trainers.torchtune.recipe import declared_adapter_only, recipe
from lorasweep.trainers.torchtune.run import STAGE, measure_lengths, train

__all__ = ["STAGE", "declared_adapter_only", "measure_lengths", "recipe", "train"]
