"""The manifest of a point: the files that it keeps, and their provenance."""

import csv
import glob
import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorasweep.experiment.sections import MODE_KEY, Controls
from lorasweep.layout import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CHANGED_MEANWHILE,
    MANIFEST,
    METRICS,
    POINTS,
    RECORD,
    REPRODUCTION,
    STATE,
    split_part_name,
)
from lorasweep.stages import TASK_RULES, TRAINING_RULES, get_timed_rules
from lorasweep.util.digest import digest_file, digest_text
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record, write_record
from lorasweep.util.usage import combine
from lorasweep.util.versions import get_git_revision


def clean_up(
    point: Path,
    settings: dict[str, Any],
    tasks: list[str],
    benchmarks: Path,
    training: str | None = None,
    evaluation: str | None = None,
) -> None:
    """Check that a point's kept files are complete, remove its temporary files, and write its manifest.

    Logs of tasks that are no longer in the experiment stay, but are not in the manifest. A full model is removed if the
    point is no longer in mode A.

    Args:
        point: The point's folder.
        settings: The point's settings, with `mode`, `dtype` and `device`.
        tasks: The tasks that the point is evaluated on.
        benchmarks: Folder of what was measured of jobs, by rule and point.
        training: The training whose time is counted for this point, if any.
        evaluation: The digest of the evaluation that the run had planned, if any.

    Raises:
        InputError: a kept file is missing, empty, or differs from its record, or the evaluation is another one.
    """
    mode = settings["mode"]
    is_trained = mode != "base" and "adapter" not in settings
    kept = [point / "recipe.yaml"] if is_trained else []
    kept += _files(point / "adapter") if mode != "base" else []
    kept += _files(point / "hf_model") if mode == "A" else []
    kept += [point / "eval" / name for name in (*(f"{task}.eval" for task in tasks), METRICS)] if tasks else []
    # Not an output of a rule: an evaluation of an earlier version has none, and who copied it may have removed it.
    kept += [file for file in (point / "eval" / REPRODUCTION,) if tasks and file.is_file()]
    digests = _recorded_digests(point / "hf_model") if mode == "A" else {}
    for file in kept:
        # A base model's code may have an empty file, which the merge has on record.
        if not file.is_file() or (file.stat().st_size == 0 and digests.get(file) != digest_text("")):
            raise InputError(f"{file}: the file is missing or empty; remove it and run again")
    left_over = (".hf_model.partial", ".hf_model.old")
    for unneeded in (STATE, *left_over, *(() if mode == "A" else ("hf_model",))):
        shutil.rmtree(point / unneeded, ignore_errors=True)
    if is_trained and (difference := describe_adapter_difference(point / "adapter", settings)):
        raise InputError(f"{difference}; remove {point / 'adapter'} and run again")
    files: list[dict[str, Any]] = [
        {
            "path": str(file.relative_to(point)),
            "bytes": file.stat().st_size,
            "modified": file.stat().st_mtime_ns,
            "sha256": digests.get(file) or digest_file(file),
        }
        for file in kept
    ]
    metrics = _read_json(point / "eval" / METRICS) if tasks else {}
    if evaluation and metrics.get("evaluation_sha256") != evaluation:
        raise InputError(f"{point}: {CHANGED_MEANWHILE}")
    adapter = point / "adapter" / ADAPTER_WEIGHTS
    adapter_sha256 = None if mode == "base" else digest_file(adapter)
    evaluated = (metrics.get("proof") or {}).get("adapter_sha256")
    if evaluated and evaluated != adapter_sha256:
        raise InputError(
            f"{point}: the evaluated adapter is {evaluated[:12]}, but the one in adapter/ is "
            f"{str(adapter_sha256)[:12]}; remove {point / 'eval'} and run again"
        )
    merged_sha256 = (metrics.get("proof") or {}).get("merged_weights_sha256")
    if mode == "A":
        merged_sha256 = _read_json(point / "hf_model" / RECORD).get("weights_sha256")
    record = _read_json(point / "adapter" / RECORD) if mode != "base" else {}
    timed = {
        stage: _list_benchmarks(benchmarks, stage, str(training) if stage in TRAINING_RULES else point.name)
        for stage in get_timed_rules(mode)
        if (bool(training) if stage in TRAINING_RULES else bool(tasks) or stage not in TASK_RULES)
        if stage not in ("train_part", "prune")
        if stage != "choose_epoch" or "task" in record.get("best_epoch", {})
    }
    usage = {stage: combine(find_record(Path(f"{file}.json")) for file in files) for stage, files in timed.items()}
    manifest = {
        "point": point.name,
        "mode": mode,
        "dtype": settings["dtype"],
        "device": settings["device"],
        "settings": {key: value for key, value in settings.items() if key not in ("mode", "dtype", "device")},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_revision": get_git_revision(),
        "adapter_sha256": adapter_sha256,
        "merged_weights_sha256": merged_sha256,
        "training": record,
        "evaluation": metrics,
        "seconds": {
            # A batch has one benchmark file; each point's share is recorded in its metrics.
            stage: metrics["seconds"] if stage == "evaluate_adapters" else _sum_seconds(files)
            for stage, files in timed.items()
        },
        "usage": {stage: measured for stage, measured in usage.items() if measured},
        "bytes": sum(entry["bytes"] for entry in files),
        "files": files,
    }
    # Unsorted: a task's first metric decides.
    write_record(point / MANIFEST, manifest, sorts=False)


def describe_adapter_difference(adapter: Path, settings: Mapping[str, Any]) -> str | None:
    """Return how an adapter's configuration (PEFT's `LoraConfig`) differs from its training's settings, or `None`.

    PiSSA and OLoRA are saved with twice the rank, and an alpha to match. With `lora_modules`, the names of modules
    depend on the model and are not compared. With `controls._override.model`, the settings do not determine the model:
    then nothing is.
    """
    if "model" in settings.get("_override", {}):
        return None
    config = _read_json(adapter / ADAPTER_CONFIG)
    # The values were checked before they were recorded.
    controls = Controls.model_construct(**settings)
    expected: dict[str, Any] = {
        "r": controls.lora_rank * (2 if controls.changes_base else 1),
        "lora_alpha": controls.alpha,
        "use_dora": controls.use_dora,
        "use_rslora": controls.use_rslora,
        # torchtune's adapters are of Llama's names.
        "target_modules": sorted({*controls.llama_modules, *(["lm_head"] * controls.apply_lora_to_output)}),
    }
    modules = config.get("target_modules")
    # Modules may be given as paths.
    parts = sorted({name.split(".")[-1] for name in modules}) if isinstance(modules, list) else modules
    actual = {"use_dora": False, "use_rslora": False, **config, "target_modules": parts}
    skipped = {"lora_alpha"} if controls.changes_base else set()
    skipped |= {"target_modules"} if controls.lora_modules is not None else set()
    for key, value in expected.items():
        if key not in skipped and actual.get(key) != value:
            return f"{adapter / ADAPTER_CONFIG}: {key} is {actual.get(key)!r}, but the point's settings say {value!r}"
    return None


def list_points(results: Path, baselines: Iterable[str]) -> list[str]:
    """Return the points of an experiment's last run, baselines first."""
    record = _read_json(results / "points.json")
    return [*baselines, *(name for name, entry in record.items() if entry["current"])]


def check_manifests(results: Path, points: Iterable[str]) -> None:
    """Check that the manifests are of the settings on record for their points. Baselines have none on record.

    Raises:
        InputError: a manifest is of other settings.
    """
    recorded = _read_json(results / POINTS)
    for point in points:
        manifest = _read_json(results / point / MANIFEST)
        settings = {**manifest["settings"], MODE_KEY: manifest["mode"]}
        if point in recorded and settings != (expected := recorded[point]["settings"]):
            key = next(key for key in {**settings, **expected} if settings.get(key) != expected.get(key))
            raise InputError(
                f"{results / point / MANIFEST}: {key} is {settings.get(key)!r}, but the experiment says "
                f"{expected.get(key)!r}; run again"
            )


def find_logs(results: Path, points: Iterable[str]) -> list[Path]:
    """Return the paths of the Inspect logs in the manifests of points."""
    manifests = {point: _read_json(results / point / MANIFEST) for point in points}
    return [
        results / point / "eval" / f"{task}.eval"
        for point, manifest in manifests.items()
        for task in manifest["evaluation"].get("tasks", {})
    ]


def _files(folder: Path) -> list[Path]:
    """Return the files of a folder, without Snakemake's own markers."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".snakemake"))


def _recorded_digests(model: Path) -> dict[Path, str]:
    """Return the digests that the merge recorded for a full model, after a check that all its files exist."""
    recorded = _read_json(model / RECORD).get("sha256", {})
    for name in recorded:
        if not (model / name).is_file():
            raise InputError(f"{model}: {name} is missing; remove the folder and run again")
    return {model / name: sha256 for name, sha256 in recorded.items()}


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _list_benchmarks(benchmarks: Path, rule: str, name: str) -> list[Path]:
    """Return the files, without their endings, of the measurements of a rule's job, and of a training's parts."""
    files = [benchmarks / rule / name]
    if rule == "train":
        parts = (benchmarks / "train_part").glob(f"{glob.escape(name)}__after=*.tsv")
        files += sorted(file.with_suffix("") for file in parts if split_part_name(file.stem)[0] == name)
    return files


def _sum_seconds(files: Iterable[Path]) -> float | None:
    """Return the wall time of jobs; `None` if none of them ran."""
    found = [seconds for file in files if (seconds := _seconds(Path(f"{file}.tsv"))) is not None]
    return sum(found) if found else None


def _seconds(benchmark: Path) -> float | None:
    """Return the wall time in seconds from a Snakemake benchmark file; `None` if the rule did not run."""
    if not benchmark.is_file():
        return None
    with benchmark.open(newline="", encoding="utf-8") as file:
        row = next(csv.DictReader(file, delimiter="\t"), None)
    return float(row["s"]) if row else None
