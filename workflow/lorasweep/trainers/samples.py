"""Tokenize the samples of a training once, before its first step.

So a sample that cannot be tokenized, or is too long, ends a training at its start and not at the step that draws it.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from lorasweep.experiment.training_data import Sample, read_samples
from lorasweep.trainers import TrainingError
from lorasweep.trainers.tokenizer import ChatTokenizer, Message
from lorasweep.util.errors import InputError

Tokens = tuple[Any, Any]
"""A sample as an array of its tokens (int32), and one of whether each token is learnt."""


def tokenize_samples(
    tokenizer: ChatTokenizer,
    *,
    data_files: str | Sequence[str],
    format: str,
    column_map: Mapping[str, str],
    new_system_prompt: str | None = None,
    train_on_input: bool = False,
    max_samples: int | None = None,
    too_long: str = "error",
) -> list[Tokens]:
    """Return the tokens of the samples in files. The arguments are the recipe's keys; see the section `data`.

    The limit for `too_long` is the tokenizer's `max_seq_len`.

    Raises:
        InputError: a sample is invalid.
        TrainingError: a sample cannot be tokenized, is too long, or no sample is left.
    """
    files = [data_files] if isinstance(data_files, str) else data_files
    samples = read_samples(files, format, column_map, max_samples, new_system_prompt)
    tokenized: list[Tokens] = []
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
    return tokenized


def count_parts(is_learnt: Sequence[bool]) -> list[int]:
    """Return the numbers of tokens in a sample's parts, alternately not learnt and learnt; see `Trainer`."""
    runs = [(key, len(list(run))) for key, run in groupby(is_learnt)]
    return [0] * bool(runs[0][0]) + [length for _, length in runs]


def _tokenize(
    tokenizer: ChatTokenizer, sample: Sample, system_prompt: str | None, train_on_input: bool
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a sample, and whether each is learnt."""
    messages = [Message("system", system_prompt, is_learnt=False)] if system_prompt is not None else []
    for role, content in sample.messages:
        messages.append(Message(role, content, is_learnt=role == "assistant" or train_on_input))
    try:
        if sample.text is not None:
            tokens = tokenizer.tokenize_text(sample.text)
            return tokens, [True] * len(tokens)
        return tokenizer.tokenize_conversation(messages)
    except Exception as error:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        raise TrainingError(f"{sample.place}: cannot be tokenized: {reason}") from error
