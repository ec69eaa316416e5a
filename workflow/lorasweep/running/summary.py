"""What a run says at its end: what is done, what failed and why, and how to go on."""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path

from lorasweep.running.events import Failure
from lorasweep.util.files import read_tail, write_aside

_LAST_LINES = 5


def write_failures(failures: Iterable[Failure], file: Path) -> None:
    """Write failures as a list of `rule`, `point` (or batch; nothing for a job of the whole sweep), `reason`, `log`."""
    content = [asdict(failure) | {"log": str(failure.log)} for failure in failures]
    write_aside(file, json.dumps(content, indent=1) + "\n")


def summarise(
    results: Path,
    points: Iterable[str],
    unfinished: Collection[str],
    failures: Iterable[Failure],
    command: str,
) -> str:
    """Return what a person reads at the end of a run.

    `unfinished` are the points of jobs that this run was to do and did not, some of which failed. A point is done when
    it has its manifest, and is none of them.
    """
    failed: dict[str, Failure] = {}
    for failure in failures:
        failed.setdefault(failure.point, failure)
    names = list(points)
    whole = [name for name in names if (results / name / "manifest.json").is_file()]
    done = [name for name in whole if name not in failed and name not in unfinished]
    waiting = [name for name in names if name not in failed and name not in done]
    count = len(names) - len(done) - len(waiting)  # of points; a job of several is none
    lines = [f"{results.name}: {len(done)} of {len(names)} points done, {count} failed, {len(waiting)} not finished"]
    for failure in failed.values():
        where = f"{failure.rule} of {failure.point}" if failure.point else failure.rule
        lines += [f"  failed: {where}: {failure.reason}", f"    its log: {failure.log}"]
        tail = [line for line in read_tail(failure.log) if line.strip()][-_LAST_LINES:]
        lines += [f"    | {line[:160]}" for line in tail]
    if failed or waiting:
        lines.append(f"To go on with what is missing: {command}")
    return "\n".join(lines)
