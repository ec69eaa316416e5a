"""Dataset for torchtune's recipes: samples as lorasweep reads them, tokenized once, before the first step.

So a sample that cannot be tokenized, or is too long, ends a training at its start and not at the step that draws it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message
from torchtune.datasets import PackedDataset

from lorasweep.experiment.training_data import Sample, read_samples
from lorasweep.trainers import TrainingError
from lorasweep.trainers.torchtune.tokenizer import ChatTokenizer
from lorasweep.util.errors import InputError


def training_data(
    tokenizer: ChatTokenizer,
    *,
    data_files: str | Sequence[str],
    format: str,
    column_map: Mapping[str, str],
    new_system_prompt: str | None = None,
    train_on_input: bool = False,
    max_samples: int | None = None,
    too_long: str = "error",
    packed: bool = False,
) -> Any:
    """Return the samples of files as a dataset of tokens and labels, packed or not.

    The arguments are the recipe's keys, with torchtune's names where it has one; `format`, `max_samples` and `too_long`
    are those of the section `data`. The limit for `too_long` and for packs is the tokenizer's `max_seq_len`. Plain text
    is split over packs; other samples are not.

    Raises:
        InputError: a sample is invalid.
        TrainingError: a sample cannot be tokenized, is too long, or no sample is left.
    """
    files = [data_files] if isinstance(data_files, str) else data_files
    samples = read_samples(files, format, column_map, max_samples, new_system_prompt)
    tokenized: list[tuple[Any, Any]] = []
    left_out = cut = 0
    for sample in samples:
        tokens, is_learnt = _tokenize(tokenizer, sample, new_system_prompt, train_on_input)
        limit = tokenizer.max_seq_len or len(tokens)
        if len(tokens) > limit and too_long == "error":
            raise TrainingError(
                f"{sample.place}: has {len(tokens)} tokens, more than max_seq_len = {limit} (data.too_long: error)"
            )
        if len(tokens) > limit and (too_long == "drop" or not any(is_learnt[:limit])):
            left_out += 1
            continue
        cut += len(tokens) > limit
        # A list of integers is ten times as large.
        tokenized.append((np.array(tokens[:limit], np.int32), np.array(is_learnt[:limit], bool)))
    if not tokenized:
        raise TrainingError(f"{', '.join(files)}: all samples are longer than max_seq_len, and left out")
    if left_out or cut:
        print(f"Samples longer than max_seq_len: {left_out} left out, {cut} cut", flush=True)
    dataset = Samples(tokenized)
    if not packed:
        return dataset
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len, split_across_pack=format == "completion")


class Samples(Dataset):  # type: ignore[misc]
    """Tokens of samples, each as an array of tokens and an array of whether each token is learnt."""

    def __init__(self, samples: Sequence[tuple[Any, Any]]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        tokens, is_learnt = self._samples[index]
        labels = np.where(is_learnt, tokens, CROSS_ENTROPY_IGNORE_IDX)
        return {"tokens": tokens.tolist(), "labels": labels.tolist()}


def _tokenize(
    tokenizer: ChatTokenizer, sample: Sample, system_prompt: str | None, train_on_input: bool
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a sample, and whether each is learnt."""
    messages = [Message(role="system", content=system_prompt, masked=True)] if system_prompt is not None else []
    for role, content in sample.messages:
        is_masked = role != "assistant" and not train_on_input
        messages.append(Message(role=role, content=content, masked=is_masked))
    try:
        if sample.text is not None:
            tokens = tokenizer.encode(sample.text)
            return tokens, [True] * len(tokens)
        tokens, mask = tokenizer.tokenize_messages(messages)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise TrainingError(f"{sample.place}: cannot be tokenized: {reason}") from error
    return tokens, [not is_masked for is_masked in mask]
