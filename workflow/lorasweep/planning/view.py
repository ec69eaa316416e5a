"""Present a plan: tables for the terminal, a summary for a dry run, a picture of storage over time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
from rich.console import Console

from lorasweep.planning.costs import ALIKE
from lorasweep.planning.planner import MODES, PointPlan, SweepPlan
from lorasweep.stages import RULE_NAMES
from lorasweep.util.formats import format_bytes, format_count, format_seconds, get_unit
from lorasweep.util.tables import FoldingTable
from lorasweep.util.vega import SERIES, Plot, finish

LONGEST = 20
"""The most points that the table lists; the others are counted."""


def describe_times(factors: Mapping[str, Any], rules: Sequence[str], device: str) -> str:
    """Return a sentence that tells measured rules from modelled ones: `factors` has the measured correction by rule."""
    measured = [f"{rule} (x{factors[rule].factor:.2f}, {factors[rule].jobs} jobs)" for rule in rules if rule in factors]
    modelled = [rule for rule in rules if not factors.keys() & {rule, ALIKE.get(rule)}]
    parts = [f"corrected by earlier jobs: {', '.join(measured)}"] if measured else []
    parts += [f"modelled only: {', '.join(modelled)}"] if modelled else []
    return f"Times on {device}, {'; '.join(parts)}."


def describe_error(error: float | None) -> str:
    """Return a sentence on the last run's ratio of actual to planned time; `None`: no earlier run."""
    if error is None:
        return "No earlier run to compare with."
    return f"Jobs of the last run took {error:.2f}x the planned time."


def describe_shortly(
    todo: SweepPlan,
    whole: Mapping[str, SweepPlan],
    done: int,
    points: int,
    parallel: int,
    guessed: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """Return a summary of the plan for a dry run; `guessed` are the rules whose workload was not counted."""
    gpu = f", {todo.gpu_hours:,.1f} GPU hours" if todo.gpu_hours else ""
    wall = format_seconds(todo.wall_seconds)
    modes = ", ".join(
        f"{mode} {format_bytes(plan.kept_bytes)}"
        + (f" + {format_bytes(plan.temporary_bytes)} at the peak" if mode == "B1" else "")
        for mode, plan in whole.items()
        if mode in MODES
    )
    return "\n".join(
        [
            f"Plan: {done} of {points} points done. To do: {format_bytes(todo.kept_bytes)} kept, "
            f"{format_bytes(todo.temporary_bytes)} temporary at the peak, {format_bytes(todo.written_bytes)} written,",
            f"  {format_seconds(todo.hours * 3600)} of job time{gpu}; wall time {wall} with {parallel} jobs at a time.",
            f"  The whole sweep keeps: {modes}.",
            *(f"  {note}" for note in notes),
            "  Times of " + f"{', '.join(guessed)} are guessed. To count tokens and samples: lorasweep plan"
            if guessed
            else "  More: lorasweep plan",
        ]
    )


def show_plan(
    console: Console,
    title: str,
    remaining: SweepPlan,
    whole: Mapping[str, SweepPlan],
    points: Sequence[PointPlan],
    notes: Sequence[str],
) -> None:
    """Print a table of the points, then one that compares the remaining jobs with the whole sweep in each mode."""
    console.print(_make_point_table(points, f"{title}: points"))
    columns: dict[str, SweepPlan] = {"to do": remaining, **whole}
    table = FoldingTable(["", *columns], title=f"{title}: the sweep")
    plans = list(columns.values())
    table.add_row("kept", *(format_bytes(plan.kept_bytes) for plan in plans))
    table.add_row("temporary, at the peak", *(format_bytes(plan.temporary_bytes) for plan in plans))
    table.add_row("written", *(format_bytes(plan.written_bytes) for plan in plans))
    table.add_row("training steps", *(f"{plan.steps:,}" for plan in plans))
    table.add_row("training tokens", *(format_count(plan.tokens) for plan in plans))
    for rule in (rule for rule in RULE_NAMES if any(rule in plan.jobs for plan in plans)):
        times = [f", {format_seconds(plan.seconds[rule])}" if plan.seconds.get(rule) else "" for plan in plans]
        table.add_row(rule, *(f"{plan.jobs.get(rule, '-')}{time}" for plan, time in zip(plans, times, strict=True)))
    table.add_row("all jobs", *(format_seconds(plan.hours * 3600) for plan in plans))
    if any(plan.gpu_hours for plan in plans):
        table.add_row("GPU hours", *(f"{plan.gpu_hours:,.2f}" for plan in plans))
    table.add_row("wall time", *(format_seconds(plan.wall_seconds) for plan in plans))
    table.add_row("largest memory", *(format_bytes(plan.mem_mb * 1e6) for plan in plans))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=False)


def _make_point_table(points: Sequence[PointPlan], title: str) -> FoldingTable:
    modes = {point.mode for point in points} - {"base"}
    title += f", mode {min(modes)}" if len(modes) == 1 else ""
    mode = ["mode"] if len(modes) > 1 else []
    columns = ("point", *mode, "", "steps", "tokens", "kept", "temp.", "written", "train", "eval")
    table = FoldingTable(columns, texts=["mode", ""], title=title)
    for point in points[:LONGEST]:
        evaluate = sum(seconds for rule, seconds in point.seconds.items() if rule.startswith("evaluate"))
        train = sum(point.seconds.values()) - evaluate  # and what makes a full model of the adapter
        table.add_row(
            point.name,
            *([point.mode] if mode else []),
            "done" if point.is_done else "to do",
            f"{point.steps:,}",
            format_count(point.tokens),
            format_bytes(point.kept_bytes),
            format_bytes(point.temporary_bytes),
            format_bytes(point.written_bytes),
            format_seconds(train) if train else "-",
            format_seconds(evaluate) if evaluate else "-",
        )
    if len(points) > LONGEST:
        table.add_row(f"... {len(points) - LONGEST} more, in plan.json")
    return table


def draw_storage(whole: Mapping[str, SweepPlan], file: Path) -> None:
    """Write a picture of disk usage over time in each mode: kept and temporary files together."""
    # Imported here: a dry run draws no picture.
    from lorasweep.util.vega import write_picture

    curves = {
        f"{mode}: {format_bytes(whole[mode].kept_bytes)} kept": [
            (seconds / 3600, kept, kept + temporary) for seconds, kept, temporary in _thin(whole[mode].timeline.moments)
        ]
        for mode in MODES
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_picture(draw_planned_storage(curves), file)


def _thin(moments: Sequence[tuple[float, int, int]], most: int = 2000) -> list[tuple[float, int, int]]:
    """Return at most about `most` of the moments: the highest of each stretch, so that peaks are kept, and the last."""
    size = -(-len(moments) // most)
    stretches = [moments[start : start + size] for start in range(0, len(moments), size)]
    return [max(stretch, key=lambda moment: moment[1] + moment[2]) for stretch in stretches] + list(moments[-1:])


def draw_planned_storage(curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> Plot:
    """Return a plot of disk usage. A curve is a list of (hours, bytes kept, bytes in all)."""
    data = pd.DataFrame(
        [(name, *moment) for name, curve in curves.items() for moment in curve],
        columns=["mode", "hours", "kept", "all"],
    )
    unit, size = get_unit(data["all"].max())
    # A logarithmic axis cannot show 0.
    data["all"] = data["all"].clip(lower=data.loc[data["all"] > 0, "all"].min()) / size
    data["kept"] /= size
    x = alt.X("hours:Q", title="hours from the start")
    colour = alt.Color("mode:N", title=None, sort=list(curves), scale=alt.Scale(range=list(SERIES)))
    line = alt.Chart(data).mark_line(interpolate="step-after", strokeWidth=1.5)
    y = alt.Y("all:Q", title=f"on disk, {unit}", scale=alt.Scale(type="log", nice=False))
    drawn = line.encode(x=x, y=y, color=colour, strokeDash=alt.StrokeDash("mode:N", title=None, sort=list(curves)))
    return finish("plan", "Storage over time", "What each mode has on disk, kept and temporary.", drawn)
