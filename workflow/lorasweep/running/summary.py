"""The summary printed at the end of a run: what is done, what failed and why, and how to continue."""

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from textwrap import indent

from lorasweep.running.events import Failure
from lorasweep.util.errors import REASON
from lorasweep.util.files import read_tail, write_aside

_LAST_LINES = 5


def write_failures(failures: Iterable[Failure], file: Path) -> None:
    """Write failures as a JSON list of `rule`, `point`, `reason` and `log`.

    `point` is the name of a point or a batch; it is empty for a job of the whole experiment.
    """
    content = [asdict(failure) | {"log": str(failure.log)} for failure in failures]
    write_aside(file, json.dumps(content, indent=1) + "\n")


def summarise(
    results: Path,
    points: Iterable[str],
    unfinished: Collection[str],
    failures: Iterable[Failure],
    command: str,
) -> str:
    """Return the summary of a run as text.

    `unfinished` are the points with planned jobs that did not finish, failed ones included. A point is done if it has
    a manifest and is not in `unfinished`.
    """
    failed: dict[str, Failure] = {}
    for failure in failures:
        failed.setdefault(failure.point, failure)
    names = list(points)
    whole = [name for name in names if (results / name / "manifest.json").is_file()]
    done = [name for name in whole if name not in failed and name not in unfinished]
    waiting = [name for name in names if name not in failed and name not in done]
    count = len(names) - len(done) - len(waiting)  # failed points; a failed batch does not count as one
    lines = [f"{results.name}: {len(done)} of {len(names)} points done, {count} failed, {len(waiting)} not finished"]
    for failure in failed.values():
        where = f"{failure.rule} of {failure.point}" if failure.point else failure.rule
        lines += [f"  failed: {where}: {indent(failure.reason, ' ' * 4).strip()}", f"    its log: {failure.log}"]
        tail = [line for line in read_tail(failure.log) if line.strip()][-_LAST_LINES:]
        lines += [f"    | {line[:160]}" for line in tail if line.strip() not in (*failure.reason.splitlines(), REASON)]
    if failed or waiting:
        lines.append(f"To continue with what is missing: {command}")
    return "\n".join(lines)
