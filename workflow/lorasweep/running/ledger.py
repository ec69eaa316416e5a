"""The ledger of a sweep: disk space kept, peak of temporary files and time spent, each beside its planned value."""

import csv
import glob
import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ValidationError

from lorasweep.layout import MANIFEST, get_usage_file
from lorasweep.planning.history import DONE, JobRecord
from lorasweep.planning.planner import PointPlan, SweepPlan
from lorasweep.stages import TRAINING_RULES
from lorasweep.util.files import find_record, write_aside
from lorasweep.util.formats import format_bytes, format_seconds
from lorasweep.util.usage import summarise

TOTAL = "total"
"""Value of `point` in the ledger's last row."""


class RunRecord(BaseModel, frozen=True):
    """Time and temporary disk space of a run, measured and as planned when the run began."""

    began: str
    folder: str = ""
    """The experiment's folder of results, as an absolute path."""
    wall_seconds: float
    peak_temporary_bytes: int
    """Largest sampled size of the temporary files."""
    planned_wall_seconds: float
    planned_temporary_bytes: int


def record_run(run: RunRecord, file: Path) -> None:
    """Add a run to the experiment's record, replacing an earlier entry of the same run."""
    runs = [*(other for other in read_runs(file) if other.began != run.began), run]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps([entry.model_dump() for entry in runs], indent=1) + "\n")


def read_runs(file: Path) -> list[RunRecord]:
    """Return the recorded runs, oldest first."""
    try:
        return [RunRecord.model_validate(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError, ValidationError):
        return []


def make_ledger(
    results: Path,
    points: Sequence[PointPlan],
    records: Sequence[JobRecord],
    runs: Sequence[RunRecord],
    full_model_bytes: Mapping[str, int],
    whole: SweepPlan,
    trainings: Mapping[str, str] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Return one row per point, then the total.

    Columns: `point`, `mode`, `is_done`, bytes kept, bytes of a full model, number of attempts and of failed attempts,
    seconds of all attempts and of failed ones, `gpu_hours`, the planned values, and what `prune` saved. The total also
    has the sampled peak of temporary bytes and the wall time of all runs, and what was spent on points that are no
    longer in the sweep. The seconds of a batch are split equally between its points.

    How busy GPUs and cores were is that of the last attempt of each job, whether or not it failed; `None` if that is
    not known. `trainings` has the name of each point's training.
    """
    spent: dict[str, dict[str, float]] = {}
    for record in records:
        members = record.members.split(";")
        for member in members:
            row = spent.setdefault(member, dict.fromkeys(_SPENT, 0.0))
            has_failed = record.state != DONE
            share = record.seconds / len(members)
            row["attempts"] += 1
            row["failed_attempts"] += has_failed
            row["job_seconds"] += share
            row["failed_seconds"] += share * has_failed
            row["gpu_hours"] += record.gpus * share / 3600
            row["planned_job_seconds"] += 0 if has_failed else record.planned_seconds / len(members)
            row["planned_gpu_hours"] += 0 if has_failed else record.gpus * record.planned_seconds / len(members) / 3600
    usage = _read_usage(results, records, trainings)
    rows = []
    for point in points:
        manifest = find_record(results / point.name / MANIFEST)
        rows.append(
            {
                "point": point.name,
                "mode": point.mode,
                "is_done": bool(manifest) and (point.is_done or manifest["finished"] >= runs[-1].began),
                "kept_bytes": manifest.get("bytes", 0),
                "planned_kept_bytes": point.kept_bytes,
                "full_model_bytes": full_model_bytes.get(point.name, 0),
                **_describe_saved(point, manifest),
                **{key: _round(value) for key, value in spent.get(point.name, dict.fromkeys(_SPENT, 0.0)).items()},
                **summarise(usage.get(point.name, ())),
            }
        )
    summed = ("kept_bytes", "planned_kept_bytes", "full_model_bytes", *_SAVED)
    total = {"point": TOTAL, "mode": "", "is_done": all(row["is_done"] for row in rows)}
    total |= {key: _round(sum(row[key] for row in rows)) for key in summed}
    total |= {key: _round(sum(row[key] for row in spent.values())) for key in _SPENT}
    # A job of several points is one attempt.
    total |= {"attempts": len(records), "failed_attempts": sum(record.state != DONE for record in records)}
    total |= summarise(record for measured in usage.values() for record in measured)
    total |= {
        "peak_temporary_bytes": max((run.peak_temporary_bytes for run in runs), default=0),
        "planned_temporary_bytes": whole.temporary_bytes,
        "wall_seconds": _round(sum(run.wall_seconds for run in runs)),
        "planned_wall_seconds": _round(whole.wall_seconds),
    }
    return [*rows, total]


def write_ledger(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the rows as CSV."""
    aside = file.with_name(f".{file.name}.tmp")
    with aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[-1]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(file)


def describe_ledger(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the ledger's totals as text, for the end of a run."""
    total = rows[-1]
    done = [row for row in rows[:-1] if row["is_done"]]
    kept = sum(row["kept_bytes"] for row in done)
    planned = sum(row["planned_kept_bytes"] for row in done)
    full = sum(row["full_model_bytes"] for row in done)
    spent, expected = format_seconds(total["job_seconds"]), format_seconds(total["planned_job_seconds"])
    wall, expected_wall = format_seconds(total["wall_seconds"]), format_seconds(total["planned_wall_seconds"])
    busy = total.get("gpu_busy")
    lines = [
        f"Kept: {format_bytes(kept)} by {len(done)} points (planned {format_bytes(planned)})"
        + (f"; as full models {format_bytes(full)}, {full / kept:,.1f} times as much" if kept and full > kept else "")
        + ".",
        f"Temporary files, peak: {format_bytes(total['peak_temporary_bytes'])} (planned "
        f"{format_bytes(total['planned_temporary_bytes'])}).",
        f"Jobs: {spent} (planned {expected}), with {total['failed_attempts']:.0f} failed attempts of "
        + format_seconds(total["failed_seconds"])
        + (f"; {total['gpu_hours']:,.2f} GPU hours" if total["gpu_hours"] else "")
        + ("" if busy is None or isnan(busy) else f", in which the GPUs were busy for {busy:.0%} of the time")
        + f". Wall time {wall} (planned {expected_wall}).",
    ]
    if total["epochs_saved"]:
        stopped = sum(row["epochs_saved"] > 0 for row in rows[:-1])
        gpu = f", {total['gpu_hours_saved']:,.2f} GPU hours" if total["gpu_hours_saved"] else ""
        lines.append(
            f"Pruned: {stopped} training{'s' * (stopped > 1)} stopped, {total['epochs_saved']:.0f} epochs not trained: "
            f"saved {format_seconds(total['seconds_saved'])}{gpu} at their own speed."
        )
    return "\n".join(lines)


def _describe_saved(point: PointPlan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the epochs that a stopped training did not train, and the time that they would have taken."""
    pruned = manifest.get("training", {}).get("pruned") if point.steps else None
    if not pruned:
        return dict.fromkeys(_SAVED, 0)
    epochs = pruned["epochs"] - pruned["after"]
    seconds = pruned["seconds"] * epochs / pruned["after"]
    gpus = manifest["settings"].get("gpus", 1) if manifest["device"] == "cuda" else 0
    saved = (epochs, _round(seconds), _round(gpus * seconds / 3600))
    return dict(zip(_SAVED, saved, strict=True))


def read_kept_bytes(point: Path) -> int:
    """Return the size in bytes of a point's kept files, from its manifest; 0 without a manifest."""
    return int(find_record(point / MANIFEST).get("bytes", 0))


_SAVED = ("epochs_saved", "seconds_saved", "gpu_hours_saved")

_SPENT = (
    "attempts",
    "failed_attempts",
    "job_seconds",
    "failed_seconds",
    "gpu_hours",
    "planned_job_seconds",
    "planned_gpu_hours",
)


def _read_usage(
    results: Path, records: Sequence[JobRecord], trainings: Mapping[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return what each point's jobs left of how busy they were."""
    jobs = dict.fromkeys((record.rule, member) for record in records for member in record.members.split(";"))
    usage: dict[str, list[dict[str, Any]]] = {}
    for rule, member in jobs:
        name = trainings.get(member) if rule in TRAINING_RULES else member
        file = get_usage_file(results, rule, str(name))
        parts = sorted(file.parent.glob(f"{glob.escape(str(name))}__after=*.json")) if rule == "train_part" else [file]
        usage.setdefault(member, []).extend(found for part in parts if (found := find_record(part)))
    # A decision is of no point: each that competes has its share.
    decisions = {record.name: record.members.split(";") for record in records if record.rule == "prune"}
    for name, members in decisions.items():
        if found := find_record(get_usage_file(results, "prune", name)):
            for member in members:
                usage.setdefault(member, []).append(found | {"points": len(members)})
    return usage


def _round(value: float) -> float:
    return round(value, 3)
