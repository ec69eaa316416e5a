"""Evaluate with Inspect: load models, prove that each has its adapter, and run every task.

A finished evaluation is never repeated, and an interrupted one resumes: see lorasweep.evaluation.state.
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

from lorasweep.adapters.adapter import AdapterError, ChangedBaseError, read_adapter
from lorasweep.adapters.identity import digest_config
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.quantization import make_quantization
from lorasweep.checkpoints.tensors import get_torch_name
from lorasweep.evaluation.inspect_tasks import EvaluationError, run_task
from lorasweep.evaluation.placement import refuse_offload
from lorasweep.evaluation.probe import base_logits, choose_tokens, measure_effect, probe_logits
from lorasweep.evaluation.prompts import PLAIN, get_replacement, prepare
from lorasweep.evaluation.roles import open_roles
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.layout import RECORD, STATE
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError, describe
from lorasweep.util.files import hold_alone
from lorasweep.util.versions import get_git_revision, get_versions


def evaluate(spec: EvaluationSpec, point: Path, probes: Path, model: Path | None = None) -> None:
    """Evaluate a full model: write `eval/<task>.eval` for each task, and `eval/metrics.json`.

    `point` is the point's folder, with its adapter. `model` is the folder of the full model, kept (A) or merged for
    this evaluation (B1); `None` for a baseline. `probes` is a folder that caches the base model's logits between
    evaluations.

    Raises:
        AdapterError: the adapter is not in the evaluated model.
        EvaluationError: a task failed.
        InputError: the base model, that of a role or a task's file has changed since the run began.
    """
    state = EvaluationState(spec, point)
    if not state.is_finished():
        state.begin(_get_surroundings(spec))
        base = _read_base(spec)
        _check_files(spec)
        open_roles(spec)
        opened, proof = _open_full_model(spec, base, point, probes, model)
        _run_tasks(spec, point.name, state, opened, proof)
    state.keep()
    state.publish()


def evaluate_adapters(spec: EvaluationSpec, points: Sequence[Path]) -> dict[str, str]:
    """Evaluate several points on one base model, loaded once. Return the reason of each failure, by point.

    A point's complete result is stored in its state, to be published later. If a point fails, the reason is stored
    there, and the next point is evaluated.

    Raises:
        ChangedBaseError: the base model in memory is not the one in its files; this call's results are discarded.
        InputError: the base model or a task's file has changed since the run began.
        RuntimeError: a CUDA error; all later points would fail too, whatever their adapters.
    """
    evaluated: list[EvaluationState] = []
    try:
        return _evaluate_all(spec, points, evaluated)
    except ChangedBaseError:
        for state in evaluated:
            state.discard()
        raise


def _evaluate_all(spec: EvaluationSpec, points: Sequence[Path], evaluated: list[EvaluationState]) -> dict[str, str]:
    """Do the work of `evaluate_adapters`; add the states of the points that it evaluates."""
    failures = {}
    with _open_adapters(spec, points) as open_model:
        for point in points:
            with hold_alone(point / STATE / "evaluate.lock", f"evaluating {point.name}"):
                state = EvaluationState(spec, point)
                try:
                    if not state.is_finished():
                        print(f"Evaluating {point.name}", flush=True)
                        state.begin(_get_surroundings(spec))
                        _check_files(spec)
                        open_roles(spec)
                        with open_model(point) as (model, proof):
                            _run_tasks(spec, point.name, state, model, proof)
                        evaluated.append(state)
                    state.keep()
                except ChangedBaseError:
                    raise
                except Exception as error:
                    is_expected = isinstance(error, InputError | EvaluationError | OSError)
                    reason = describe(error)
                    state.fail(reason)
                    print(f"{point.name} failed: {reason if is_expected else traceback.format_exc()}", flush=True)
                    if "CUDA error" in reason:
                        raise
                    failures[point.name] = reason
    return failures


def _read_base(spec: EvaluationSpec) -> Checkpoint:
    base = read_checkpoint(Path(spec.base_model), spec.chat_template)
    if base.fingerprint != spec.base_fingerprint:
        raise InputError(f"{spec.base_model}: the base model has changed since this run began")
    return base


def _check_files(spec: EvaluationSpec) -> None:
    """Check that the files of tasks are those that the spec, and so the record, has the digests of.

    Raises:
        InputError: one has changed.
    """
    for file, digest in spec.files.items():
        if not Path(file).is_file() or digest_file(Path(file)) != digest:
            raise InputError(f"{file}: the file of a task has changed since this run began; run the same command again")


def _open_full_model(
    spec: EvaluationSpec, base: Checkpoint, point: Path, probes: Path, full: Path | None
) -> tuple[Any, dict[str, Any]]:
    """Return the Inspect model and the proof that it has the point's adapter; `full` is the model folder of A or B1."""
    proof: dict[str, Any] = spec.base_proof
    if full is None:
        if spec.backend == "vllm":
            from lorasweep.evaluation.vllm import make_served_model

            return make_served_model(spec, base, None, ()), proof
        return make_model(spec, f"hf/{point.name}", base, model_path=str(base.path)), proof
    adapter = read_adapter(point / "adapter", base)
    record = json.loads((full / RECORD).read_text(encoding="utf-8"))
    # What earlier versions merged lacks the configuration's digest.
    config = digest_config(adapter.path)
    made_of = (record["adapter_sha256"], record.get("adapter_config_sha256", config), record["base_model_fingerprint"])
    if made_of != (adapter.sha256, config, base.fingerprint):
        raise AdapterError(f"{full}: this model was not made from {base.path} and the adapter in {adapter.path}")
    proof["adapter_sha256"] = adapter.sha256
    proof["adapter_tensors"] = record["adapter_tensors"]
    proof["merged_weights_sha256"] = record.get("weights_sha256")
    tokens = choose_tokens(adapter)
    before = base_logits(base, spec, probes, tokens)
    model = make_model(spec, f"hf/{point.name}", base, model_path=str(full))
    proof["probe_distance"] = measure_effect(adapter, probe_logits(model.api.model, tokens), before)
    return model, proof


@contextmanager
def _open_adapters(spec: EvaluationSpec, points: Sequence[Path]) -> Iterator[Callable[[Path], Any]]:
    """Yield a function that opens a point's model. The base is loaded on the first call and freed at the end."""
    base = _read_base(spec)
    if spec.backend == "vllm":
        from lorasweep.evaluation.vllm import open_server

        with open_server(spec, base, points) as open_served:
            yield open_served
        return
    import lorasweep.evaluation.provider  # noqa: F401  registers the provider, even if this package is not installed

    kept: list[Any] = []  # keeps the base loaded between two adapters

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
        model.api.base.restore()  # shows that the base was the same for all adapters
        model.api.close()


def make_model(spec: EvaluationSpec, name: str, checkpoint: Checkpoint, **model_args: Any) -> Any:
    """Return a model of Inspect's provider `hf` or of lorasweep's, which takes the same arguments."""
    from inspect_ai.model import get_model

    sampled = spec.temperature > 0
    if template := PLAIN if spec.has_plain_prompts else get_replacement(checkpoint, spec.template_date):
        model_args["chat_template"] = template
    if spec.quantize:
        model_args["quantization_config"] = make_quantization(spec.quantize, spec.dtype)
        if "base" in model_args:  # of lorasweep's provider: nothing can be merged into quantized weights
            model_args["merged"] = False
    # A chat template writes the special tokens; the tokenizer would add a second one in front.
    writes_special_tokens = checkpoint.has_chat_template and not spec.has_plain_prompts
    model = get_model(
        name,
        memoize=False,
        config=spec.make_generate_config(temperature=spec.temperature if sampled else None),
        device=spec.placement,
        dtype=get_torch_name(spec.dtype),
        do_sample=sampled,
        tokenizer_call_args={"add_special_tokens": not writes_special_tokens},
        **model_args,
    )
    refuse_offload(model.api.model)
    if not hasattr(model.api, "base"):  # lorasweep's provider prepares a base once for all adapters
        prepare(model.api, checkpoint)
    return model


def _get_versions(spec: EvaluationSpec) -> dict[str, str]:
    # A task that is not a file is `<package>/<task>`.
    packages = {task.task.partition("/")[0] for task in spec.tasks if not task.task.partition("@")[0].endswith(".py")}
    used = {name for task in spec.tasks for name in (task.solver, task.scorer) if name}
    packages |= {name.partition("/")[0] for name in used if "/" in name and not name.partition("@")[0].endswith(".py")}
    packages |= {role.model.partition("/")[0] for role in (spec.model_roles or {}).values()}
    backend = ["vllm"] if spec.backend == "vllm" else ["peft", *(["bitsandbytes"] if spec.quantize else [])]
    return get_versions("torch", "transformers", "inspect-ai", "tokenizers", *backend, *sorted(packages))


def _get_surroundings(spec: EvaluationSpec) -> dict[str, str]:
    """Return what an unfinished evaluation is continued under only: versions, and the number of GPUs if several."""
    return _get_versions(spec) | ({"gpus": str(spec.gpus)} if spec.gpus > 1 else {})


def _run_tasks(spec: EvaluationSpec, point: str, state: EvaluationState, model: Any, proof: dict[str, Any]) -> None:
    """Run every task of a point, and store the result in its state."""
    metrics: dict[str, Any] = {"mode": spec.mode, "backend": spec.backend, "proof": proof, "tasks": {}}
    metrics["spec"] = spec.model_dump(mode="json")
    metrics["versions"] = _get_versions(spec)
    metrics["git_revision"] = get_git_revision()
    metrics["end_tokens"] = model.api.end_tokens
    if spec.template_date:
        metrics["template_date"] = spec.template_date
    if spec.model_roles:
        metrics["model_roles"] = {name: role.model for name, role in spec.model_roles.items()}
    if spec.gpus > 1:
        metrics["gpus"] = spec.gpus
    if spec.quantize:
        metrics["quantize"] = spec.quantize
    logs = {}
    began = time.monotonic()
    with _keep_inspects_files_in(state.data):
        for task in spec.tasks:
            _check_files(spec)  # Inspect reads a task's file when the task begins
            metadata = {"point": point, "mode": spec.mode, "end_tokens": model.api.end_tokens, **proof}
            log_dir = state.get_log_dir(task.name)
            logs[task.name], metrics["tasks"][task.name] = run_task(spec, task, model, log_dir, point, metadata)
    metrics["seconds"] = round(time.monotonic() - began, 3)
    state.finish(logs, metrics)


@contextmanager
def _keep_inspects_files_in(data: Path) -> Iterator[None]:
    """Have Inspect write its resumption data to `data`, and its trace to a temporary folder."""
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
