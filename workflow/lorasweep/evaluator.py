"""Evaluation with Inspect: load a point's model once, prove that its adapter is in it, and run every task."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from lorasweep.adapter import AdapterError, check_injected, read_adapter
from lorasweep.checkpoint import read_checkpoint
from lorasweep.errors import InputError
from lorasweep.evaluation import EvaluationSpec, TaskSpec
from lorasweep.layout import RECORD, STATE
from lorasweep.probe import base_logits, probe_logits
from lorasweep.versions import get_versions


def evaluate(spec: EvaluationSpec, point: Path, probes: Path, merged: Path | None = None) -> None:
    """Evaluate one point: write `eval/<task>.eval` for each task, and `eval/metrics.json`.

    `point` is the point's folder, with its adapter and, in mode A, its full model; `merged` is the model that was made
    for this evaluation, in mode B1. `probes` keeps the base model's logits between evaluations. Unfinished logs stay
    in `state/eval/`, to be looked at.

    Raises:
        AdapterError: the adapter is not in the evaluated model.
        EvaluationError: a task did not end in success.
    """
    state = point / STATE / "eval"
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    os.environ["INSPECT_TRACE_FILE"] = str(state.resolve() / "trace.log")
    os.environ["XDG_DATA_HOME"] = str(state.resolve() / "data")

    model, proof = _load_model(spec, point, probes, merged or point / "hf_model")
    results = point / "eval"
    results.mkdir(exist_ok=True)
    # A task that is no file is registered by the package before the slash.
    packages = [task.task.partition("/")[0] for task in spec.tasks if not task.task.partition("@")[0].endswith(".py")]
    versions = get_versions("torch", "transformers", "peft", "inspect-ai", "tokenizers", *packages)
    metrics: dict[str, Any] = {"mode": spec.mode, "proof": proof, "versions": versions, "tasks": {}}
    for task in spec.tasks:
        log, scores = _run_task(task, model, state / task.name, point.name, {**proof, "mode": spec.mode})
        os.replace(log, results / f"{task.name}.eval")
        metrics["tasks"][task.name] = scores
    aside = state / "metrics.json"
    aside.write_text(json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    aside.replace(results / "metrics.json")
    shutil.rmtree(state)


class EvaluationError(RuntimeError):
    """A task ended in an error, or without all of its samples."""


def _load_model(spec: EvaluationSpec, point: Path, probes: Path, full: Path) -> tuple[Any, dict[str, Any]]:
    """Return the Inspect model, and the proof that the point's adapter is in it; `full` is the model of A or B1."""
    base = read_checkpoint(Path(spec.base_model))
    if base.fingerprint != spec.base_fingerprint:
        raise InputError(f"{spec.base_model}: the base model is not the one that this run began with")
    proof: dict[str, Any] = {"base_model": spec.base_model, "base_model_fingerprint": base.fingerprint}
    if spec.mode == "base":
        return _make_model(spec, point.name, base.path, base.has_chat_template), proof
    adapter = read_adapter(point / "adapter", base)
    proof["adapter_sha256"] = adapter.sha256
    if spec.mode == "B2":
        model = _make_model(spec, point.name, base.path, base.has_chat_template)
        before = probe_logits(model.api.model)
        model.api.model.load_adapter(str(adapter.path))
        proof["adapter_tensors"] = check_injected(adapter, model.api.model.state_dict())
    else:
        record = json.loads((full / RECORD).read_text())
        if record["adapter_sha256"] != adapter.sha256:
            raise AdapterError(f"{full}: was made of another adapter than the one in {adapter.path}")
        proof["adapter_tensors"] = record["adapter_tensors"]
        proof["merged_weights_sha256"] = record.get("weights_sha256")
        before = base_logits(base, spec.dtype, spec.device, probes)
        model = _make_model(spec, point.name, full, base.has_chat_template)
    proof["probe_distance"] = float((probe_logits(model.api.model) - before).abs().max())
    if proof["probe_distance"] == 0:
        raise AdapterError(f"{adapter.path}: the model answers the probe as its base does: the adapter has no effect")
    return model, proof


def _make_model(spec: EvaluationSpec, label: str, path: Path, has_chat_template: bool) -> Any:
    from inspect_ai.model import GenerateConfig, get_model

    sampled = spec.temperature > 0
    return get_model(
        f"hf/{label}",
        memoize=False,
        config=GenerateConfig(
            max_connections=spec.max_connections,
            max_tokens=spec.max_tokens,
            temperature=spec.temperature if sampled else None,
            seed=spec.seed,
            system_message=spec.system_prompt,
        ),
        model_path=str(path),
        device="cuda:0" if spec.device == "cuda" else "cpu",
        dtype={"bf16": "bfloat16", "fp32": "float32"}[spec.dtype],
        do_sample=sampled,
        # A chat template writes the special tokens itself; the tokenizer would put a second one in front.
        tokenizer_call_args={"add_special_tokens": not has_chat_template},
    )


def _run_task(task: TaskSpec, model: Any, log_dir: Path, point: str, metadata: dict[str, Any]) -> tuple[str, Any]:
    """Run one task; return the path of its log, and its scores."""
    from inspect_ai import eval as inspect_eval

    [log] = inspect_eval(
        task.task,
        model=model,
        task_args=task.args,
        limit=task.limit,
        log_dir=str(log_dir),
        log_format="eval",
        metadata={"point": point, **metadata},
        tags=[point],
        display="plain",
        score_display=False,
        ctl_server=False,
    )
    if log.status != "success" or log.results is None:
        reason = str(log.error.message if log.error else log.status).strip()
        raise EvaluationError(f"{point}: {task.task} did not succeed: {reason} (its log: {log.location})")
    completed, total = log.results.completed_samples, log.results.total_samples
    if completed != total:
        raise EvaluationError(f"{point}: {task.task} has {completed} of {total} samples (its log: {log.location})")
    scores = {
        f"{_name(score)}/{name}": metric.value for score in log.results.scores for name, metric in score.metrics.items()
    }
    return log.location.removeprefix("file://"), {
        "scores": scores,
        "samples": log.results.completed_samples,
        "seconds": log.stats.started_at and _seconds(log.stats.started_at, log.stats.completed_at),
    }


def _name(score: Any) -> str:
    """A scorer's name, with how a sample's epochs were reduced to one score where that is not their mean."""
    return f"{score.name}[{score.reducer}]" if score.reducer not in (None, "mean") else str(score.name)


def _seconds(start: str, end: str) -> float:
    from datetime import datetime

    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
