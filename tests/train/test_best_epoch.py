"""The best epoch of a training by torchtune."""

import interrupted_training
from keeps_best_epoch import KeepsBestEpoch


class TestBestEpoch(KeepsBestEpoch):
    trainer = "torchtune"
    train_and_end = staticmethod(interrupted_training.train_and_end)
