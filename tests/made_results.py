"""A results folder as runs leave it, with scores that are drawn: for tests of tables, plots and the report."""

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lorasweep.cli.job import collect as job
from lorasweep.experiment.points import SEPARATOR, format_value
from lorasweep.layout import get_baseline_name, is_base

SCORE = "match"
METRIC = "match/accuracy"
TASK = "letters"


def make_results(
    results: Path,
    variables: Mapping[str, Sequence[Any]],
    chances: Any,
    samples: int = 40,
    base_chance: float | Mapping[str, float] | None = 0.3,
    steps: int = 20,
    seed: int = 0,
    noise: float = 0.1,
) -> pd.DataFrame:
    """Make the folder of a sweep over `variables`, and return the samples' scores.

    `chances` gives of a point's values how likely a sample is right; the same samples are hard for every point, but for
    the noise. `base_chance` gives the same of the base model, or of each model by its name.
    """
    draw = np.random.default_rng(seed)
    hardness = draw.uniform(size=samples)
    points = [dict(zip(variables, values, strict=True)) for values in product(*variables.values())]
    record, rows = {}, []
    for settings in points:
        named = {key: f"{key}={format_value(value, key)}" for key, value in settings.items()}
        name = SEPARATOR.join(sorted(re.sub(r"[^\w.=+-]", "_", part) for part in named.values()))
        settings = {"lora_rank": 8, **settings}  # as every trained point has one
        record[name] = {
            "current": True,
            "settings": {"mode": "B1", **settings},
            "swept": sorted(variables),
            "is_run": False,
        }
        scores = (hardness + draw.normal(0, noise, samples) < chances(settings)).astype(float)
        rows += make_point(results, name, settings, scores, steps)
    for model, chance in (base_chance if isinstance(base_chance, Mapping) else {None: base_chance}).items():
        if chance is not None:
            settings = {"mode": "base", **({"model": model} if model else {})}
            rows += make_point(results, get_baseline_name(model), settings, (hardness < chance).astype(float), 0)
    (results / "points.json").write_text(json.dumps(record))
    frame = pd.DataFrame(rows, columns=["point", "task", "sample", "epoch", "score", "value"])
    frame.to_parquet(results / "samples.parquet", index=False)
    times = pd.date_range("2026-01-01", periods=20, freq="min").strftime("%Y-%m-%dT%H:%M:%S+00:00")
    storage = pd.DataFrame({"time": times, "kept_bytes": range(0, 100_000_000, 5_000_000), "temporary_bytes": 3e8})
    storage.to_csv(results / "storage.csv", index=False)
    experiment = {
        "experiment": {"name": results.name, "question": "Which setting is best?"},
        "variables": {key: list(values) for key, values in variables.items()},
        "model": {"path": "model"},
        "evaluation": {"tasks": ["tasks.py@letters"]},
    }
    (results / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return frame


def collect(results: Path, variables: Sequence[str]) -> None:
    """Make the tables, as the workflow has them made."""
    arguments = ["--results", results, "--samples", results / "samples.parquet", "--variables", *variables]
    baselines = [folder.name for folder in results.iterdir() if is_base(folder.name)]
    arguments += ["--tasks", TASK, "--report", "{}", "--baselines", *baselines, "--output", results / "results.csv"]
    parser = argparse.ArgumentParser()
    job.add_arguments(parser)
    job.run(parser.parse_args(list(map(str, arguments))))


def make_point(results: Path, name: str, settings: Mapping[str, Any], scores: Any, steps: int) -> list[tuple[Any, ...]]:
    """Make a point's folder; return the scores of its samples."""
    folder = results / name
    is_baseline = settings.get("mode") == "base"
    (folder / "eval").mkdir(parents=True)
    (folder / "eval" / f"{TASK}.eval").write_bytes(b"a log")
    if steps:
        (folder / "adapter").mkdir()
        log = pd.DataFrame({"step": range(1, steps + 1), "epoch": 1, "loss": 3 / np.sqrt(np.arange(1, steps + 1))})
        log.assign(lr=1e-3, tokens=log["step"] * 100, seconds=log["step"] * 0.5, validation_loss=None).to_csv(
            folder / "adapter/training_log.csv", index=False
        )
    trained = {key: value for key, value in settings.items() if key not in ("mode", "epoch")}
    recipe = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()
    training = {"epochs": 1, "steps": steps, "tokens": steps * 100, "final_train_loss": 3 / np.sqrt(max(steps, 1))}
    manifest = {
        "point": name,
        "mode": settings.get("mode", "B1"),
        "dtype": "fp32",
        "device": "cpu",
        "settings": {key: value for key, value in settings.items() if key != "mode"},
        "git_revision": "0" * 40,
        "adapter_sha256": None if is_baseline else "a" * 64,
        "training": {} if is_baseline else {**training, "recipe_sha256": recipe, "versions": {"torchtune": "0.6.1"}},
        "evaluation": {
            "proof": {"base_model_fingerprint": "f" * 64},
            "spec": {
                **dict.fromkeys(("dtype", "system_prompt", "max_tokens"), None),
                "tasks": [{"name": TASK, "task": "tasks.py@letters", "args": {}, "limit": None}],
                "files": {"tasks.py": "d" * 64},
                "temperature": 0,
                "seed": 0,
            },
            "tasks": {TASK: {"scores": {METRIC: scores.mean(), "match/stderr": 0.05}, "samples": len(scores)}},
            "versions": {"inspect-ai": "0.3.285"},
        },
        "seconds": {"evaluate": 4.0} if is_baseline else {"train": 10.0, "evaluate": 5.0},
        "bytes": 10 if is_baseline else 5_000_000,
        "files": [],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return [(name, TASK, f"s{index}", 1, SCORE, value) for index, value in enumerate(scores)]
