"""Evaluation with Inspect: load models, prove that the adapter is in each, and run every task.

What an evaluation finishes is never done again; what it began goes on where it was: see lorasweep.evaluation_state.
"""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.adapters.adapter import AdapterError, read_adapter
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.tensors import get_torch_name
from lorasweep.evaluation.inspect_tasks import EvaluationError, run_task
from lorasweep.evaluation.probe import base_logits, measure_effect, probe_logits
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.layout import RECORD, STATE
from lorasweep.util.errors import InputError
from lorasweep.util.files import hold_alone
from lorasweep.util.versions import get_versions

_PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A template that writes no more than what messages say."""


def evaluate(spec: EvaluationSpec, point: Path, probes: Path, merged: Path | None = None) -> None:
    """Evaluate a point on a model of its own: write `eval/<task>.eval` for each task, and `eval/metrics.json`.

    `point` is the point's folder, with its adapter and, in mode A, its full model; `merged` is the model that was made
    for this evaluation, in mode B1. `probes` keeps the base model's logits between evaluations.

    Raises:
        AdapterError: the adapter is not in the evaluated model.
        EvaluationError: a task did not end in success.
    """
    state = EvaluationState(spec, point)
    if not state.is_finished():
        state.begin(_get_versions(spec))
        base = _read_base(spec)
        model, proof = _open_full_model(spec, base, point, probes, merged or point / "hf_model")
        _run_tasks(spec, point.name, state, model, proof)
    state.keep()
    state.publish()


def evaluate_adapters(spec: EvaluationSpec, points: Sequence[Path]) -> dict[str, str]:
    """Evaluate several points on one base model that is loaded once; return the points that failed, and why.

    Each point's result lies in its state as soon as it is whole, to be published. One that fails leaves word there, and
    the next begins.

    Raises:
        InputError: the base model is another than it was.
        RuntimeError: the GPU gave up: what would fail from here on would not be the adapters' fault.
    """
    failures = {}
    with _open_adapters(spec, points) as open_model:
        for point in points:
            with hold_alone(point / STATE / "evaluate.lock", f"evaluating {point.name}"):
                state = EvaluationState(spec, point)
                try:
                    if not state.is_finished():
                        print(f"{point.name} is evaluated", flush=True)
                        state.begin(_get_versions(spec))
                        with open_model(point) as (model, proof):
                            _run_tasks(spec, point.name, state, model, proof)
                    state.keep()
                except Exception as error:
                    is_expected = isinstance(error, InputError | EvaluationError | OSError)
                    reason = str(error) if is_expected else f"{type(error).__name__}: {error}"
                    state.fail(reason)
                    print(f"{point.name} failed: {reason if is_expected else traceback.format_exc()}", flush=True)
                    if "CUDA error" in reason:
                        raise
                    failures[point.name] = reason
    return failures


def _read_base(spec: EvaluationSpec) -> Checkpoint:
    base = read_checkpoint(Path(spec.base_model))
    if base.fingerprint != spec.base_fingerprint:
        raise InputError(f"{spec.base_model}: the base model is not the one that this run began with")
    return base


def _open_full_model(
    spec: EvaluationSpec, base: Checkpoint, point: Path, probes: Path, full: Path
) -> tuple[Any, dict[str, Any]]:
    """Return the Inspect model, and the proof that the point's adapter is in it; `full` is the model of A or B1."""
    proof: dict[str, Any] = spec.base_proof
    if spec.mode == "base":
        if spec.backend == "vllm":
            from lorasweep.evaluation.vllm import make_served_model

            return make_served_model(spec, base, None, ()), proof
        return make_model(spec, f"hf/{point.name}", base, model_path=str(base.path)), proof
    adapter = read_adapter(point / "adapter", base)
    record = json.loads((full / RECORD).read_text(encoding="utf-8"))
    if record["adapter_sha256"] != adapter.sha256:
        raise AdapterError(f"{full}: was made of another adapter than the one in {adapter.path}")
    proof["adapter_sha256"] = adapter.sha256
    proof["adapter_tensors"] = record["adapter_tensors"]
    proof["merged_weights_sha256"] = record.get("weights_sha256")
    before = base_logits(base, spec.dtype, spec.device, probes)
    model = make_model(spec, f"hf/{point.name}", base, model_path=str(full))
    if spec.mode == "B1":
        # By the model's arguments Inspect knows an evaluation that it began; where this merge lies says nothing.
        model.model_args.pop("model_path")
    proof["probe_distance"] = measure_effect(adapter, probe_logits(model.api.model), before)
    return model, proof


@contextmanager
def _open_adapters(spec: EvaluationSpec, points: Sequence[Path]) -> Iterator[Callable[[Path], Any]]:
    """Give a way to open each point's model while the base is there; the base is loaded when the first is opened."""
    base = _read_base(spec)
    if spec.backend == "vllm":
        from lorasweep.evaluation.vllm import open_server

        with open_server(spec, base, points) as open_served:
            yield open_served
        return
    import lorasweep.evaluation.provider  # noqa: F401  registers it, wherever this package lies

    kept: list[Any] = []  # holds the base between two adapters

    @contextmanager
    def open_model(point: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
        if not kept:
            kept.append(make_model(spec, "lorasweep/base", base, base=str(base.path)))
        name = f"lorasweep/{point.name}"
        model = make_model(spec, name, base, base=str(base.path), adapter=str(point / "adapter"))
        try:
            yield model, spec.base_proof | model.api.proof
        finally:
            model.api.close()

    yield open_model
    for model in kept:
        model.api.close()


def make_model(spec: EvaluationSpec, name: str, checkpoint: Checkpoint, **model_args: Any) -> Any:
    """Make a model of Inspect's provider for Hugging Face, or of ours, which takes the same arguments."""
    from inspect_ai.model import get_model

    sampled = spec.temperature > 0
    if spec.has_plain_prompts:
        model_args["chat_template"] = _PLAIN
    # A chat template writes the special tokens itself; the tokenizer would put a second one in front.
    writes_special_tokens = checkpoint.has_chat_template and not spec.has_plain_prompts
    return get_model(
        name,
        memoize=False,
        config=spec.make_generate_config(temperature=spec.temperature if sampled else None),
        device="cuda:0" if spec.device == "cuda" else "cpu",
        dtype=get_torch_name(spec.dtype),
        do_sample=sampled,
        tokenizer_call_args={"add_special_tokens": not writes_special_tokens},
        **model_args,
    )


def _get_versions(spec: EvaluationSpec) -> dict[str, str]:
    # A task that is no file is registered by the package before the slash.
    packages = {task.task.partition("/")[0] for task in spec.tasks if not task.task.partition("@")[0].endswith(".py")}
    used = {name for task in spec.tasks for name in (task.solver, task.scorer) if name}
    packages |= {name.partition("/")[0] for name in used if "/" in name and not name.partition("@")[0].endswith(".py")}
    backend = ["vllm"] if spec.backend == "vllm" else ["peft"]
    return get_versions("torch", "transformers", "inspect-ai", "tokenizers", *backend, *sorted(packages))


def _run_tasks(spec: EvaluationSpec, point: str, state: EvaluationState, model: Any, proof: dict[str, Any]) -> None:
    """Run every task of a point; its state has the result then."""
    metrics: dict[str, Any] = {"mode": spec.mode, "backend": spec.backend, "proof": proof, "tasks": {}}
    metrics["versions"] = _get_versions(spec)
    logs = {}
    began = time.monotonic()
    with _keep_inspects_files_in(state.data):
        for task in spec.tasks:
            metadata = {"point": point, "mode": spec.mode, **proof}
            logs[task.name], metrics["tasks"][task.name] = run_task(spec, task, model, state, point, metadata)
    metrics["seconds"] = round(time.monotonic() - began, 3)
    state.finish(logs, metrics)


@contextmanager
def _keep_inspects_files_in(data: Path) -> Iterator[None]:
    """Let Inspect write what it needs to go on into `data`, and its trace to a place that does not stay."""
    before = os.environ.copy()
    with tempfile.TemporaryDirectory(prefix="inspect-") as scratch:
        os.environ["XDG_DATA_HOME"] = str(data.resolve())
        os.environ.setdefault("INSPECT_TRACE_FILE", f"{scratch}/trace.log")
        try:
            yield
        finally:
            for name in ("XDG_DATA_HOME", "INSPECT_TRACE_FILE"):
                if name in before:
                    os.environ[name] = before[name]
                else:
                    del os.environ[name]
