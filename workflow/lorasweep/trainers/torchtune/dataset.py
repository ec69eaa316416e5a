"""The dataset of torchtune's recipes: samples as lorasweep reads and tokenizes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset

from lorasweep.trainers.samples import Tokens, tokenize_samples
from lorasweep.trainers.torchtune.tokenizer import ChatTokenizer


def training_data(tokenizer: ChatTokenizer, *, packed: bool = False, **keys: Any) -> Any:
    """Return the samples of files as a dataset of tokens and labels, packed or not.

    `keys` are the arguments of `tokenize_samples`. The limit of packs is the tokenizer's `max_seq_len`. Plain text is
    split over packs; other samples are not.

    Raises:
        InputError, TrainingError: as by `tokenize_samples`.
    """
    dataset = Samples(tokenize_samples(tokenizer, **keys))
    if not packed:
        return dataset
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len, split_across_pack=keys["format"] == "completion")


class Samples(Dataset):  # type: ignore[misc]
    """Tokens of samples, with labels as torchtune's loss reads them."""

    def __init__(self, samples: Sequence[Tokens]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, is_learnt = self._samples[index]
        labels = np.where(is_learnt, tokens, CROSS_ENTROPY_IGNORE_IDX)
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}
