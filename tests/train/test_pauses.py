"""A training by torchtune that pauses."""

import interrupted_training
from pauses import Pauses


class TestPauses(Pauses):
    trainer = "torchtune"
    train_and_end = staticmethod(interrupted_training.train_and_end)
