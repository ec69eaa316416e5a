"""How busy the jobs of a sweep kept their GPUs or cores: by rule, and what to change where GPUs idled."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.layout import MANIFEST, get_rung_name, get_usage_file
from lorasweep.stages import RULE_NAMES
from lorasweep.util.files import find_record
from lorasweep.util.formats import format_bytes, format_seconds
from lorasweep.util.usage import summarise

IDLE = 0.5
"""Share of its time below which a GPU counts as idle."""

_LEAST_SECONDS = 60
"""Jobs that took less are mostly start-up, and are not named."""

_MOST_NAMED = 10


@dataclass(frozen=True)
class Usage:
    """A section of the report."""

    devices: str
    """`GPUs`, or `cores` where no job had a GPU that could be measured."""
    rows: Sequence[tuple[str, ...]]
    """Of each rule: its name, number of jobs, their time, mean and least share of the time, and the peak of memory."""
    idle: Sequence[tuple[str, str]]
    """The jobs whose GPUs idled, the most hours first: which, and what to change."""
    others: int
    """The number of such jobs that are not listed."""
    is_known: bool
    """Whether it is known of any job how busy its GPUs were."""


@dataclass(frozen=True)
class _Job:
    rule: str
    name: str
    record: Mapping[str, Any]
    settings: Mapping[str, Any]
    mode: str
    backend: str = ""
    """Of the point's evaluation; empty if it has none."""
    batch_size: int = 0
    """The batch size with which the point's training ended; 0 if that is not known."""


def describe_usage(results: Path, labels: Mapping[str, str], rungs: Sequence[int] = ()) -> Usage | None:
    """Return how busy jobs were: those of points, by their manifests; `None` if that is not known of any.

    `labels` has the points in their order, with what each is called, and `rungs` the epochs after which `prune` scored
    adapters.
    """
    jobs = _list_jobs(results, labels)
    backend = next((job.backend for job in jobs if job.backend), "")
    jobs += [replace(decision, backend=backend) for decision in _list_decisions(results, rungs)]
    on_gpus = [job for job in jobs if "gpu_busy" in job.record or "peak_gpu_memory_bytes" in job.record]
    key, shown = ("gpu_busy", on_gpus) if on_gpus else ("cpu_busy", jobs)
    rows = []
    for rule in RULE_NAMES:
        if of_rule := [job.record for job in shown if job.rule == rule]:
            rows.append(_describe_rule(rule, of_rule, key))
    idle = [job for job in on_gpus if job.record.get("gpu_busy", 1) < IDLE and job.record["seconds"] >= _LEAST_SECONDS]
    idle.sort(key=lambda job: -job.record["seconds"] * job.record["gpus"] * (1 - job.record["gpu_busy"]))
    named = [(f"{job.rule} of {job.name}", _advise(job)) for job in idle[:_MOST_NAMED]]
    is_known = any("gpu_busy" in job.record for job in on_gpus)
    return Usage("GPUs" if on_gpus else "cores", rows, named, len(idle) - len(named), is_known) if rows else None


def _list_jobs(results: Path, labels: Mapping[str, str]) -> list[_Job]:
    jobs: dict[Any, _Job] = {}
    for point, label in labels.items():
        manifest = find_record(results / point / MANIFEST)
        for rule, record in manifest.get("usage", {}).items():
            several = record.get("points", 1)
            name = f"{label} and {several - 1} more" if several > 1 else label
            # The points of a batch have the same record.
            key = (rule, json.dumps(record, sort_keys=True) if several > 1 else point)
            backend = manifest["evaluation"].get("backend", "")
            batch_size = manifest["training"].get("batch_size_used", 0)
            jobs.setdefault(key, _Job(rule, name, record, manifest["settings"], manifest["mode"], backend, batch_size))
    return list(jobs.values())


def _list_decisions(results: Path, rungs: Sequence[int]) -> list[_Job]:
    return [
        _Job("prune", f"the trainings after epoch {after}", record, {}, "")
        for after in rungs
        if (record := find_record(get_usage_file(results, "prune", get_rung_name(after))))
    ]


def _describe_rule(rule: str, records: Sequence[Mapping[str, Any]], key: str) -> tuple[str, ...]:
    # A batch is here once, with all of its time.
    whole = summarise({**record, "points": 1} for record in records)
    shares = [record[key] for record in records if key in record]
    peak = whole["peak_gpu_memory_bytes"]
    most = max(records, key=lambda record: record.get("peak_gpu_memory_bytes", 0)).get("gpu_memory_bytes")
    return (
        rule,
        str(len(records)),
        format_seconds(mean(record["seconds"] for record in records)),
        f"{whole[key]:.0%}" if whole[key] is not None else "not known",
        f"{min(shares):.0%}" if shares else "not known",
        (format_bytes(peak) + (f" of {format_bytes(most)}" if most else "")) if peak else "",
    )


def _advise(job: _Job) -> str:
    record, settings = job.record, job.settings
    peak, memory, gpus = (record.get(key, 0) for key in ("peak_gpu_memory_bytes", "gpu_memory_bytes", "gpus"))
    is_training = job.rule == "train"
    was_lowered = is_training and bool(job.batch_size) and job.batch_size < settings.get("batch_size", 0)
    # vLLM reserves most of the memory as it starts, whatever it needs.
    is_memory_told = bool(peak and memory) and (is_training or job.backend != "vllm")
    is_full = was_lowered or (is_memory_told and peak > 0.9 * memory)
    if is_training:
        changes = _advise_training(settings, job.batch_size, is_full)
    else:
        changes = [] if is_full else ["a larger evaluation.max_connections, the samples of a batch"]
        is_alone = job.rule == "evaluate" and job.mode in ("A", "B1")
        changes += ["mode B2, which evaluates several adapters in one job"] if is_alone else []
    changes += ["fewer GPUs"] if gpus > 1 else []
    text = f"busy for {record['gpu_busy']:.0%} of {format_seconds(record['seconds'])}."
    text += f" To try: {'; '.join(changes)}." if changes else ""
    if was_lowered:
        text += f" Its batch_size was lowered to {job.batch_size}, as the memory was not enough."
    elif is_memory_told:
        text += f" At most {format_bytes(peak)} of {format_bytes(memory)} of its memory were in use"
        text += ": as it is, a larger batch has no room." if is_full else ", which leaves room for a larger batch."
    return text


def _advise_training(settings: Mapping[str, Any], used: int, is_full: bool) -> list[str]:
    """Return what to change; `used` is the batch size with which the training ended, 0 if that is not known."""
    asked = settings.get("batch_size", 0)
    batch, accumulated = used or asked, settings.get("gradient_accumulation_steps", 1)
    accumulated *= asked // batch if asked > batch else 1  # the effective batch is kept
    larger = "a larger batch_size" + (f" than {batch}" if batch else "")
    larger += f", with fewer gradient_accumulation_steps than {accumulated}" if accumulated > 1 else ""
    can_recompute = not settings.get("enable_activation_checkpointing")
    changes = [f"enable_activation_checkpointing: true, then {larger}"] if can_recompute else []
    changes = changes if is_full else [larger]
    is_torchtune = settings.get("trainer", DEFAULT_TRAINER) == DEFAULT_TRAINER
    changes += ["packed: true, if samples are short"] if is_torchtune and not settings.get("packed") else []
    changes += [] if settings.get("compile") else ["compile: true"]
    return changes
