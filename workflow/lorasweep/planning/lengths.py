"""The lengths of samples in tokens, and what follows from them: sequences per epoch, and samples that are too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lorasweep.experiment.sections import Controls, Data, DataKey
from lorasweep.experiment.training_data import read_samples
from lorasweep.util.errors import InputError

BYTES_PER_TOKEN = 4
"""Assumed bytes per token of text whose tokens were not counted."""


_MOST_PLACES = 10
"""The most samples whose places a message lists."""


class Sequences(NamedTuple):
    """What an epoch of a training consists of: samples, or packs of samples."""

    number: int
    mean: float
    """Mean tokens of a sequence."""


class TooLong(NamedTuple):
    """The samples of more than `max_seq_len` tokens. Shares are of the learnt tokens of all samples."""

    samples: Sequence[int]
    """Their positions in the data, from 0."""
    without_answer: int
    """How many of them have no learnt token within the limit."""
    cut_share: float
    """Share of the tokens that are lost if the samples are cut."""
    dropped_share: float
    """Share of the tokens that are lost if the samples are left out."""


@dataclass(frozen=True)
class Lengths:
    """Lengths of training samples in tokens: of each sample if they are counted, else their mean."""

    parts: Sequence[Sequence[float]]
    """For each sample, the tokens of its parts: alternately not learnt and learnt. If not counted, one mean sample."""
    data: Data
    samples: int
    are_counted: bool = True
    """Whether the trainer's tokenizer counted the lengths; otherwise they are guessed from the size of the text."""

    @classmethod
    def guess(cls, data: Data, samples: int, size: int) -> "Lengths":
        """Return the lengths of so many samples with so many bytes of text in all."""
        return cls([[0, size / BYTES_PER_TOKEN / max(1, samples)]], data, samples, are_counted=False)

    @classmethod
    def count(cls, data: Data, parts: Sequence[Sequence[int]]) -> "Lengths":
        """Return the lengths of samples whose parts were counted."""
        return cls(parts, data, len(parts))

    @cached_property
    def _lengths(self) -> list[float]:
        return [sum(parts) for parts in self.parts]

    def get_length(self, sample: int) -> float:
        """Return the tokens of a sample, given its position."""
        return self._lengths[sample]

    @cached_property
    def _sequences(self) -> dict[tuple[int | None, bool], Sequences]:
        return {}

    def get_sequences(self, controls: Controls) -> Sequences:
        """Return the sequences of an epoch. Cached: many points share a few limits."""
        limit = controls.max_seq_len
        key = (limit, controls.packed)
        if key not in self._sequences:
            self._sequences[key] = self._count_sequences(limit, controls.packed and limit is not None)
        return self._sequences[key]

    def _count_sequences(self, limit: int | None, is_packed: bool) -> Sequences:
        used = [
            min(length, limit or length)
            for parts, length in zip(self.parts, self._lengths, strict=True)
            if not limit or length <= limit or not self.are_counted or self._is_cut(parts, limit)
        ]
        tokens, count = sum(used), len(used)
        if not self.are_counted:
            tokens, count = tokens * self.samples, self.samples
        if is_packed and limit:
            if not self.are_counted:
                count = max(1, int(tokens / limit))
            elif self.data.format == "completion":
                count = -(-int(tokens) // limit)
            else:
                count = _count_packs(used, limit)
        return Sequences(count, tokens / max(1, count))

    def _is_cut(self, parts: Sequence[float], limit: int) -> bool:
        """Whether a sample that is too long is cut, and not left out. (With `error` there is no training.)"""
        return self.data.too_long != "drop" and _count_learnt(parts, limit) > 0

    @cached_property
    def _too_long(self) -> dict[int, TooLong]:
        return {}

    def find_too_long(self, limit: int) -> TooLong:
        """Return the samples that are longer than a limit. The lengths must be counted."""
        if limit not in self._too_long:
            found = [index for index, length in enumerate(self._lengths) if length > limit]
            within = [_count_learnt(self.parts[index], limit) for index in found]
            learnt = sum(sum(self.parts[index][1::2]) for index in found)
            whole = max(1, sum(sum(parts[1::2]) for parts in self.parts))
            without = sum(not kept for kept in within)
            self._too_long[limit] = TooLong(found, without, (learnt - sum(within)) / whole, learnt / whole)
        return self._too_long[limit]


def check_too_long(lengths: Lengths, key: DataKey, limit: int) -> str:
    """Return a note on samples of more than `limit` tokens, which are cut or left out; "" if there are none.

    Raises:
        InputError: there are such samples, and `data.too_long` is `error`; or no sample is left.
    """
    found, data = lengths.find_too_long(limit), lengths.data
    if not found.samples:
        return ""
    which = _describe(lengths, key, found.samples, f"max_seq_len = {limit} tokens")
    cut, dropped = f"{found.cut_share:.1%}", f"{found.dropped_share:.1%}"
    if data.too_long == "error":
        raise InputError(
            f"data.{key}: {which}. To cut them would lose {cut} of the tokens to learn, to leave them out {dropped}",
            "a larger max_seq_len, or data.too_long: truncate or drop",
        )
    left_out = len(found.samples) if data.too_long == "drop" else found.without_answer
    if left_out == lengths.samples:
        raise InputError(f"data.{key}: {which}. None is left", "a larger max_seq_len")
    if data.too_long == "drop":
        return f"data.{key}: {which}. They are left out, with {dropped} of the tokens to learn (data.too_long: drop)."
    without = f" {left_out:,} of them are left out, since no token to learn is within the limit." if left_out else ""
    note = f"They are cut, which loses {cut} of the tokens to learn (data.too_long: truncate)."
    return f"data.{key}: {which}. {note}{without}"


def check_positions(lengths: Lengths, key: DataKey, limit: int | None, most: int) -> None:
    """Check that a model, which takes `most` tokens, takes every sample as `max_seq_len`, here `limit`, leaves it.

    Raises:
        InputError: a sample is longer.
    """
    too_long = [] if limit and limit <= most else lengths.find_too_long(most).samples
    if limit and lengths.data.too_long == "drop":
        too_long = [sample for sample in too_long if lengths.get_length(sample) <= limit]
    if too_long:
        raise InputError(
            f"data.{key}: {_describe(lengths, key, too_long, f'the {most} tokens that the model takes')}",
            f"controls.max_seq_len: {most} with data.too_long: truncate or drop, or a model with a longer context",
        )


def _describe(lengths: Lengths, key: DataKey, samples: Sequence[int], limit: str) -> str:
    """Return how many samples are too long, and the places of the first."""
    shown = ", ".join(f"{place} ({lengths.get_length(i):.0f})" for i, place in _find_places(lengths, key, samples))
    more = len(samples) - _MOST_PLACES
    which = f"{len(samples):,} of {lengths.samples:,} samples have more than {limit}: {shown}"
    return which + (f" and {more:,} more" if more > 0 else "")


def _find_places(lengths: Lengths, key: DataKey, samples: Sequence[int]) -> list[tuple[int, str]]:
    """Return the first of these samples, each with its place in the files."""
    data = lengths.data
    most = data.max_samples if key == "train" else None
    places = [sample.place for sample in read_samples(data.get_files(key), data.format, data.columns, most)]
    # A dataset component of the user's may have other samples than the files.
    is_known = len(places) == lengths.samples
    return [(index, places[index] if is_known else f"sample {index + 1}") for index in samples[:_MOST_PLACES]]


def _count_learnt(parts: Sequence[float], limit: int) -> float:
    """Return how many of a sample's learnt tokens are among the first `limit` tokens."""
    start, learnt = 0.0, 0.0
    for index, length in enumerate(parts):
        if index % 2:
            learnt += max(0, min(length, limit - start))
        start += length
    return learnt


def _count_packs(lengths: Sequence[float], limit: int) -> int:
    """Return how many packs samples fill, in order, each with as many whole samples as fit."""
    packs, filled = 0, float(limit)
    for length in lengths:
        if filled + length > limit:
            packs, filled = packs + 1, 0.0
        filled += length
    return packs
