"""Show the status of a run: as a live view that fits the terminal, or printed once as text."""

import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from textwrap import shorten

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from lorasweep.layout import HOLDER, MANIFEST
from lorasweep.running.controller import Holder, read_holder
from lorasweep.running.outages import NEVER
from lorasweep.running.status import (
    BADLY,
    INTERRUPTED,
    STATUS,
    WELL,
    JobStatus,
    RunStatus,
    get_age,
    is_current,
    read_status,
    read_step,
)
from lorasweep.util.formats import format_bytes, format_seconds
from lorasweep.util.tables import FoldingTable

REFRESH_SECONDS = 2.0

PATIENCE = 4
"""Number of updates that a run may miss before the view warns about it."""

_SMALLEST_HEIGHT = 24
_LINES_BESIDE_JOBS = 13
_FAILURES_SHOWN = 5
_REASON_LINES = 4
_REASON_WIDTH = 160
"""Lines of a reason, and characters of each, in a view that has to fit the terminal."""

_HELD = ("JobHeld", "ReqNodeNotAvail", "Reservation")
"""Beginnings of SLURM's reasons that do not pass by other jobs' ends."""

_ENDS = {
    WELL: "with all its jobs done",
    BADLY: "with failures",
    INTERRUPTED: "because it was interrupted",
}


def watch(results: Path, console: Console) -> None:
    """Show the status of an experiment's run: in a terminal until the run ends or Ctrl-C is pressed, elsewhere once."""
    if not console.is_terminal or not is_going_on(results):
        console.print(render(results, None))
        return
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        try:
            while True:
                goes_on = is_going_on(results)
                live.update(render(results, max(console.height, _SMALLEST_HEIGHT)), refresh=True)
                if not goes_on:
                    return
                time.sleep(REFRESH_SECONDS)
        except KeyboardInterrupt:
            return


def is_going_on(results: Path) -> bool:
    """Whether a process runs the experiment. A process on another machine counts as running until `--unlock`."""
    holder = read_holder(results / HOLDER)
    return holder is not None and not holder.is_gone


def render(results: Path, height: int | None) -> RenderableType:
    """Return the view: cut to `height` lines, or with all jobs and failures listed in the status if it is `None`."""
    # In this order: a run writes its last status before it releases the holder file.
    holder = read_holder(results / HOLDER)
    status = read_status(results / STATUS)
    if status is None or (holder and not is_current(status, holder)):
        return Text("\n".join(_describe_without_status(results, holder)))
    goes_on = holder is not None and not holder.is_gone
    parts: list[RenderableType] = [Text(_describe_run(results.name, status, holder), style="bold")]
    if goes_on and status.outage:
        parts.append(Text(status.outage))
    parts.append(Text(_describe_stages(status)))
    if goes_on and status.running:
        parts.append(_make_jobs(results, status, height))
    parts += [Text(line) for line in _describe_failures(status, height)]
    parts += [Text(line) for line in _describe_rest(status, goes_on)]
    return Group(*parts)


def _describe_without_status(results: Path, holder: Holder | None) -> Iterator[str]:
    if holder and holder.is_gone:
        yield f"{results.name}: no run is going on. {holder} ended before it wrote a status."
    elif holder:
        yield f"{results.name}: is being run by {holder}, which has not written a status yet."
    else:
        yield f"{results.name}: no run is going on, and there is no status of an earlier one."
    yield f"Points with a manifest in {results}: {sum(1 for _ in results.glob(f'*/{MANIFEST}'))}."


def _describe_run(name: str, status: RunStatus, holder: Holder | None) -> str:
    jobs = f"{status.jobs_done} of {status.jobs} jobs done"
    last = _format_time(status.updated)
    if status.outcome:
        return f"{name}: no run is going on. The last ended at {last} {_ENDS[status.outcome]}: {jobs}."
    if holder is None or holder.is_gone:
        return (
            f"{name}: no run is going on. The last was killed; its last update was at {last}: {jobs}. Run the same "
            "command again to continue."
        )
    text = f"{name}: running since {_format_time(status.began)}, {jobs}; by {holder.user} on {holder.host}."
    if (age := get_age(status.updated)) > PATIENCE * status.interval_seconds:
        text += f" No update for {format_seconds(age)}: it is stopped, or its machine is down (docs/how-to/slurm.md)."
    return text


def _describe_stages(status: RunStatus) -> str:
    total = sum(status.points.values())
    return f"Points: {total}. " + ", ".join(f"{stage} {number}" for stage, number in status.points.items()) + "."


def _make_jobs(results: Path, status: RunStatus, height: int | None) -> FoldingTable:
    most_lines = None
    if height is not None:
        failures = sum(text.count("\n") + 1 for text in _describe_failures(status, height))
        most_lines = height - _LINES_BESIDE_JOBS - failures
    columns = ("running", "point", "since", "for", "step", "loss", "left")
    table = FoldingTable(columns, texts=["running", "since"], name=1, most_lines=most_lines)
    for job in status.running if most_lines is None else status.running[: max(3, most_lines)]:
        table.add_row(*_describe_job(results, job))
    table.more = status.running_jobs - len(table)
    return table


def _describe_job(results: Path, job: JobStatus) -> list[str]:
    name = f"{job.name} ({job.points} points)" if job.points > 1 else job.name
    age = get_age(job.since)
    cells = [job.rule, name, _format_time(job.since), format_seconds(age)]
    if is_queued(results, job):
        return [*cells, describe_wait(job.reason), "", ""]
    step = read_step(results / job.log) if job.log else None
    progress = ["", ""]
    if step:
        progress = [f"{step.step} of {job.steps}" if job.steps else str(step.step), f"{step.loss:.4g}"]
    left = "" if job.seconds_left is None else format_seconds(job.seconds_left)
    return [*cells, *progress, left]


def describe_wait(reason: str) -> str:
    """Return why a job of SLURM has not started, by SLURM's word for it (squeue's `%r`)."""
    if not reason or reason == "None":
        return "queued"
    if NEVER.match(reason):
        return f"will not start: {reason}"
    return f"{'held' if reason.startswith(_HELD) else 'waiting'}: {reason}"


def is_queued(results: Path, job: JobStatus) -> bool:
    """Whether a SLURM job has not started yet, by its log."""
    if job.slurm_job is None or not job.job_log:
        return False
    try:
        began = (results / job.job_log).stat().st_mtime
    except OSError:
        return True
    return began < datetime.fromisoformat(job.since).timestamp()


def _describe_failures(status: RunStatus, height: int | None) -> Iterator[str]:
    shown = status.failures if height is None else status.failures[-_FAILURES_SHOWN:]
    if hidden := status.failed_jobs - len(shown):
        yield f"failed: {hidden} earlier ones not shown; failures.json has all once the run has ended"
    for failure in shown:
        where = f"{failure.rule} of {failure.point}" if failure.point else failure.rule
        reason = failure.reason.splitlines()
        if height is not None:
            cut = ["..."] if len(reason) > _REASON_LINES else []
            reason = [shorten(line, _REASON_WIDTH) for line in reason[:_REASON_LINES]] + cut
        yield f"failed: {where}: " + "\n  ".join(reason)
        yield f"  its log: {failure.log}"


def _describe_rest(status: RunStatus, goes_on: bool) -> Iterator[str]:
    yield (
        f"On disk: {format_bytes(status.kept_bytes)} kept of {format_bytes(status.planned_kept_bytes)} planned; "
        f"{format_bytes(status.temporary_bytes)} temporary, {format_bytes(status.peak_temporary_bytes)} at the peak of "
        "this run."
    )
    if not goes_on:
        return
    basis = "by the plan; no job is done yet"
    if status.error is not None:
        basis = f"jobs so far took {status.error:.2f}x their planned time"
    if status.seconds_left is None:
        yield f"Time left: not known ({basis})."
    else:
        yield f"Time left: about {format_seconds(status.seconds_left)} ({basis})."


def _format_time(timestamp: str) -> str:
    """Format a time in the local time zone, with the date unless it is today."""
    local = datetime.fromisoformat(timestamp).astimezone()
    is_today = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M")
