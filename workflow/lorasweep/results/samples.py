"""Read the scores of all samples from Inspect logs, by their summaries. Requires Inspect and pandas."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from lorasweep.util.errors import InputError, nearest

if TYPE_CHECKING:
    from inspect_ai.log import EvalSampleSummary
    from inspect_ai.model import ChatMessage

COLUMNS = ("point", "task", "sample", "epoch", "score", "value")

_LARGE = {"messages", "events", "store", "attachments"}
"""Parts of a sample that are not read for its metadata."""


def read_samples(logs: Iterable[Path], cluster: str | None = None) -> pd.DataFrame:
    """Return the scores in Inspect logs at `<point>/eval/<task>.eval`.

    Columns: `point`, `task`, `sample` (a digest of id, input and target), `epoch`, `score`, `value`. A value is the
    number that Inspect's own metrics use: correct 1, partly correct 0.5, incorrect or no answer 0. A scorer with
    several values has one score per value, by its name. `cluster` is a key of the samples' metadata: a digest of its
    value is in the column `cluster`, for tasks whose samples have the key.

    Raises:
        InputError: no task has samples with the key, or only some samples of a task have it.
    """
    from inspect_ai.log import read_eval_log_sample_summaries

    rows: list[tuple[Any, ...]] = []
    found: dict[str, set[bool]] = {}
    keys: set[str] = set()
    for log in logs:
        metadata = _read_metadata(log) if cluster else {}
        for sample in read_eval_log_sample_summaries(log):
            # The id alone does not identify a sample: a task that shuffles its data may reuse ids.
            key = _digest([str(sample.id), _get_text(sample.input), sample.target])
            group: tuple[str | None, ...] = ()
            if cluster:
                known = metadata[sample.id, sample.epoch]
                keys |= known.keys()
                found.setdefault(log.stem, set()).add(cluster in known)
                group = (_digest(str(known[cluster])) if cluster in known else None,)
            for score, value in _get_scores(sample):
                rows.append((log.parents[1].name, log.stem, key, sample.epoch, score, value, *group))
    if cluster and found:
        _check_clusters(cluster, found, keys)
    # Sorted, since Inspect's order is that in which samples ended, which differs between runs.
    rows.sort(key=lambda row: row[:6])
    return pd.DataFrame(rows, columns=[*COLUMNS, *(["cluster"] if cluster else [])])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _get_text(messages: "str | list[ChatMessage]") -> str:
    """Return a sample's input as text. Messages have ids, which differ between runs."""
    if isinstance(messages, str):
        return messages
    return "\n".join(f"{message.role}: {message.text}" for message in messages)


def _read_metadata(log: Path) -> dict[tuple[int | str, int], dict[str, Any]]:
    """Return the metadata of the samples of a log by their id and epoch. Summaries cut long values off."""
    from inspect_ai.log import read_eval_log_samples

    samples = read_eval_log_samples(log, all_samples_required=False, exclude_fields=_LARGE)
    return {
        (sample.id, sample.epoch): {key: value for key, value in sample.metadata.items() if value is not None}
        for sample in samples
    }


def _check_clusters(cluster: str, found: Mapping[str, Collection[bool]], keys: Collection[str]) -> None:
    """Check that all samples of a task have the key or none, and those of some task do."""
    if all(True not in has for has in found.values()):
        problem = f"report.cluster: no sample has the key {cluster!r} in its metadata{nearest(cluster, keys)}"
        raise InputError(problem, ", ".join(sorted(keys)) or "null, as no sample has metadata")
    for task, has in found.items():
        if len(has) > 1:
            raise InputError(
                f"report.cluster: only some samples of the task '{task}' have the key {cluster!r} in their metadata",
                "a key that all samples of a task have",
            )


def _get_scores(sample: "EvalSampleSummary") -> Iterator[tuple[str, float]]:
    from inspect_ai.scorer import value_to_float

    for score, found in (sample.scores or {}).items():
        values = found.value if isinstance(found.value, dict) else {score: found.value}
        for name, value in values.items():
            if value is not None and value == value:
                yield name, float(value_to_float()(value))
