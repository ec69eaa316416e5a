"""Record every attempt of every job as it ends: durations of earlier runs, for the ledger and the next plan."""

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
    """One attempt of a job."""

    run: str
    """Start time of the run that the attempt belongs to."""
    rule: str
    name: str
    """Name of the job's point or batch."""
    members: str
    """The points of the job, separated by `;`."""
    state: str
    """`done`, `failed`, or `cancelled` if the run was interrupted."""
    seconds: float
    """Duration by the scheduler's record; without one, by Snakemake's clock, which includes queue time."""
    is_queued: bool
    """Whether `seconds` includes queue time."""
    gpus: int
    planned_seconds: float
    """Duration that the plan expected at the start of the run."""
    modelled_seconds: float
    """Duration by the cost model, without corrections from earlier jobs."""
    device: str
    base: str
    """The base model's fingerprint."""


def append_records(records: Sequence[JobRecord], file: Path) -> None:
    """Append attempts to the experiment's record."""
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
    """Return the recorded attempts, oldest first. A line truncated by a crash is skipped."""
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
    """How a rule's earlier jobs compare with the cost model."""

    factor: float
    """Median of actual / modelled seconds."""
    jobs: int
    """Number of jobs that the median is taken over."""


def learn(experiments: Iterable[Iterable[JobRecord]], device: str, base: str) -> dict[str, Experience]:
    """Return each rule's experience on this device: from jobs on this base model if there are any, else on any model.

    Skipped: records that include queue time, and attempts that follow a failure, which may have resumed halfway.
    `experiments` has the records of each, in the order in which the attempts ended.
    """
    ratios: dict[tuple[str, bool], list[float]] = {}
    for record in (record for records in experiments for record in _leave_out_resumed(records)):
        if record.device == device and not record.is_queued and record.modelled_seconds > 0:
            key = (record.rule, record.base == base)
            ratios.setdefault(key, []).append(record.seconds / record.modelled_seconds)
    experience = {}
    for is_same in (False, True):
        for (rule, same), values in ratios.items():
            if same == is_same:
                experience[rule] = Experience(median(values), len(values))
    return experience


def _leave_out_resumed(records: Iterable[JobRecord]) -> Iterator[JobRecord]:
    """Yield the attempts of an experiment that were done, but for those that follow a failure of the same job."""
    was_begun: set[tuple[str, str]] = set()
    for record in records:
        job = (record.rule, record.name)
        if record.state != DONE:
            was_begun.add(job)
        elif job in was_begun:
            was_begun.remove(job)
        else:
            yield record


def get_last_error(records: Sequence[JobRecord]) -> float | None:
    """Return the last run's ratio of actual to planned job time; `None` if no job was done."""
    done = [r for r in records if r.state == DONE and r.planned_seconds > 0 and not r.is_queued]
    last = [record for record in done if record.run == done[-1].run] if done else []
    return sum(r.seconds for r in last) / sum(r.planned_seconds for r in last) if last else None
