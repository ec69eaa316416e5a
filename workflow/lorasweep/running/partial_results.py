"""Write partial tables and a partial report of the finished points, for a run that did not finish all points."""

import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

from lorasweep.layout import MANIFEST
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.errors import find_reason

_FILES = ("samples.parquet", "results.csv", "results.parquet", "replicates.csv", "answer.json", "report.html")
_PLOTS = "plots-partial"


def write_partial_results(sweep: Sweep, unfinished: Collection[str], root: Path, *, reads_samples: bool) -> str:
    """Write partial results beside the complete ones; return a message, or "" if no point is done.

    `reads_samples`: whether the environment that reads Inspect logs is installed. Without it there are no intervals.
    """
    results = sweep.results
    done = [
        point
        for point in dict.fromkeys([*sweep.baselines, *sweep.points])
        if point not in unfinished and (results / point / MANIFEST).is_file()
    ]
    if not done:
        return ""
    samples, table = f"{results}/samples-partial.parquet", f"{results}/results-partial.csv"
    run, job = str(root / "scripts/run"), ["-m", "lorasweep", "job"]
    of_these = ["--results", results, "--points", *done]
    collected = ["--variables", *sweep.variables, "--tasks", *sweep.deciding_tasks, "--output", table]
    collected += ["--report", sweep.experiment.report.model_dump_json()]
    page = ["--output", f"{results}/report-partial.html", "--plots", f"{results}/{_PLOTS}"]
    steps: list[list[object]] = [
        ["driver", *job, "collect", *of_these, *collected],
        ["driver", *job, "report", "--table", table, "--pipeline", sweep.pipeline, *page],
    ]
    if reads_samples:
        steps[0] += ["--samples", samples]
        steps.insert(0, ["eval", *job, "read_samples", *of_these, *sweep.reading_options, "--output", samples])
    for step in steps:
        completed = subprocess.run([run, *map(str, step)], capture_output=True, encoding="utf-8", errors="replace")
        if completed.returncode:
            return f"No partial report: {find_reason(completed.stderr.splitlines()) or completed.stderr.strip()}"
    return f"Results of the finished points: {table} and {results}/report-partial.html"


def drop_partial_results(results: Path) -> None:
    """Remove the partial results of earlier runs."""
    shutil.rmtree(results / _PLOTS, ignore_errors=True)
    for name in _FILES:
        (results / name.replace(".", "-partial.")).unlink(missing_ok=True)
