"""Every attempt of every job, written down as it ends: what earlier runs took, for the ledger and for the next plan."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import BaseModel, ValidationError

from lorasweep.util.files import end_last_line

DONE = "done"
FAILED = "failed"
CANCELLED = "cancelled"


class JobRecord(BaseModel, frozen=True):
    """An attempt of a job."""

    run: str
    """When the run began that it belongs to."""
    rule: str
    name: str
    """The point's, or the batch's."""
    members: str
    """The points of the job, with `;` between them."""
    state: str
    """`done`, `failed`, or `cancelled`, which is how a run that was interrupted leaves it."""
    seconds: float
    """From its start to its end, as the scheduler says; where none does, as Snakemake saw it, with time in a queue."""
    is_queued: bool
    """Whether the seconds have time in a queue in them."""
    gpus: int
    planned_seconds: float
    """What the plan expected when the run began."""
    modelled_seconds: float
    """What the model alone expects."""
    device: str
    base: str
    """The base model's fingerprint."""


def append_records(records: Sequence[JobRecord], file: Path) -> None:
    """Add attempts to the experiment's record."""
    if not records:
        return
    is_new = not file.is_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    end_last_line(file)
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(JobRecord.model_fields))
        if is_new:
            writer.writeheader()
        writer.writerows(record.model_dump() for record in records)


def read_records(file: Path) -> list[JobRecord]:
    """Return the attempts on record, the oldest first; a line that a crash cut short is passed over."""
    return list(_read(file))


def _read(file: Path) -> Iterator[JobRecord]:
    if not file.is_file():
        return
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            try:
                yield JobRecord.model_validate(row)
            except ValidationError:
                continue


@dataclass(frozen=True)
class Experience:
    """What a rule's jobs took before, beside what the model says."""

    factor: float
    """Median of seconds / modelled seconds."""
    jobs: int


def learn(records: Iterable[JobRecord], device: str, base: str) -> dict[str, Experience]:
    """Return by rule what jobs on this device took, of this base model where there are some, else of any.

    Those whose seconds have time in a queue in them teach nothing, nor does the attempt after one that failed: it may
    have had the rest alone to do. `records` are in the order in which the attempts ended.
    """
    ratios: dict[tuple[str, bool], list[float]] = {}
    was_begun: set[tuple[str, str]] = set()
    for record in records:
        if record.state != DONE:
            was_begun.add((record.rule, record.name))
            continue
        if (record.rule, record.name) in was_begun:
            was_begun.remove((record.rule, record.name))
            continue
        if record.device == device and not record.is_queued and record.modelled_seconds > 0:
            key = (record.rule, record.base == base)
            ratios.setdefault(key, []).append(record.seconds / record.modelled_seconds)
    experience = {}
    for is_same in (False, True):
        for (rule, same), found in ratios.items():
            if same == is_same:
                experience[rule] = Experience(median(found), len(found))
    return experience


def get_last_error(records: Sequence[JobRecord]) -> float | None:
    """Return how many times longer the last run's jobs took than its plan said; none where no job was done."""
    done = [r for r in records if r.state == DONE and r.planned_seconds > 0 and not r.is_queued]
    last = [record for record in done if record.run == done[-1].run] if done else []
    return sum(r.seconds for r in last) / sum(r.planned_seconds for r in last) if last else None
