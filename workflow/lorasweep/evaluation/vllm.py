"""Evaluate with Inspect's vLLM provider: one server for a base model and all its adapters.

Inspect starts the server, loads adapters into it, and stops it (inspect_ai/model/_providers/vllm.py). This module adds
the server's maximum rank, the refusal of adapters that vLLM cannot apply, and the proof that an adapter was applied.
"""

import asyncio
import atexit
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from lorasweep.adapters.adapter import Adapter, AdapterError, read_adapter
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.tensors import get_torch_name
from lorasweep.evaluation.prompts import PREFIX_VARIABLE, describe_requests, get_replacement, read_end_tokens
from lorasweep.evaluation.spec import VLLM_RANKS, EvaluationSpec
from lorasweep.util.errors import InputError

_PROBES = ("The", "1 + 1 =", "Once upon a time", "def main():")
"""Prompts on which an adapter's answers must differ from the base's."""

_ROLES = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
"""How Inspect asks a model without a chat template."""

_TOP = 20
"""Number of top logprobs to compare for the first token: vLLM's default maximum."""


@contextmanager
def open_server(spec: EvaluationSpec, base: Checkpoint, points: Sequence[Path]) -> Iterator[Callable[[Path], Any]]:
    """Yield a function that opens a point's model on one server. The server starts on first use, and stops at the end.

    The function raises AdapterError if vLLM cannot apply the point's adapter, or the adapter has no effect.
    """
    adapters = {}
    for point in points:
        try:
            adapter = read_adapter(point / "adapter", base)
            refuse_unserved(adapter)
        except AdapterError:  # raised again by open_model, for this point alone
            continue
        adapters[point] = adapter
    base_model = make_served_model(spec, base, None, adapters.values())
    base_answers: list[Any] = []

    @contextmanager
    def open_model(point: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
        adapter = adapters.get(point)
        if adapter is None:
            adapter = read_adapter(point / "adapter", base)
            refuse_unserved(adapter)
        if not base_answers:
            base_answers.extend(_ask(base_model) for _ in range(2))
        answers = _ask(make_served_model(spec, base, adapter, adapters.values()))
        distance, noise = measure_distance(answers, base_answers[0]), measure_distance(*base_answers)
        if not distance > noise:
            raise AdapterError(
                f"{adapter.path}: the adapter has no effect: the logprobs of vLLM's answers differ by {distance} from "
                f"the base's, and those of two runs of the base by {noise}"
            )
        proof: dict[str, Any] = {"adapter_sha256": adapter.sha256, "adapter_tensors": len(adapter.tensors)}
        proof |= spec.base_proof | {"probe_distance": distance}
        yield make_served_model(spec, base, adapter, adapters.values()), proof

    try:
        yield open_model
    finally:
        base_model.api.close()


def make_served_model(
    spec: EvaluationSpec, base: Checkpoint, adapter: Adapter | None, all_adapters: Collection[Adapter]
) -> Any:
    """Return an Inspect model. The first request to any of these models starts the server, with that model's arguments.

    Raises:
        InputError: a path contains ':'.
    """
    from inspect_ai.model import get_model

    name = f"vllm/{base.path.resolve()}"
    if adapter:
        name += f":{adapter.path.resolve()}"
    if name.count(":") > bool(adapter):
        raise InputError(
            f"{name}: ':' is not allowed in these paths, as it separates base and adapter in a vLLM name",
            "paths without ':'",
        )
    ends = read_end_tokens(base)
    config = spec.make_generate_config(temperature=spec.temperature)
    model = get_model(
        name,
        memoize=False,
        config=config.model_copy(update={"extra_body": describe_requests(base, ends)}),
        **get_server_args(spec, base, all_adapters),
    )
    model.api.end_tokens = ends.names
    return model


def get_server_args(spec: EvaluationSpec, base: Checkpoint, adapters: Collection[Adapter]) -> dict[str, Any]:
    """Return the arguments of `vllm serve`, in Inspect's form.

    They set `max_lora_rank`, as Inspect's own value would be the largest `r` of the adapters' configurations. But
    `rank_pattern` can have a larger rank, and vLLM accepts only the values in `VLLM_RANKS`.
    """
    arguments: dict[str, Any] = {"dtype": get_torch_name(spec.dtype), "seed": spec.seed}
    if spec.gpus > 1:
        arguments["tensor_parallel_size"] = spec.gpus
    if adapters:
        rank = max(map(_get_rank, adapters))
        arguments |= {"enable_lora": True, "max_lora_rank": next(limit for limit in VLLM_RANKS if rank <= limit)}
    template = get_replacement(base, spec.template_date)
    if any(task.assistant_prefix for task in spec.tasks):
        # After what the template writes where an answer begins. A request without the variable has nothing there.
        # Jinja leaves out a line break at a template's end.
        template = (template or base.chat_template or _ROLES).removesuffix("\n") + f"{{{{ {PREFIX_VARIABLE} }}}}"
    elif not base.has_chat_template:
        arguments["use_chat_template"] = False
    if template:
        arguments["chat_template"] = _write(template)
    return arguments


@cache
def _write(template: str) -> str:
    """Write a chat template to a temporary file, and return its path. vLLM unescapes one that is given as text."""
    folder = tempfile.mkdtemp(prefix="lorasweep-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = Path(folder, "chat_template.jinja")
    file.write_text(template, encoding="utf-8")
    return str(file)


def _get_rank(adapter: Adapter) -> int:
    """Return the largest rank in an adapter's configuration and tensors: vLLM's limit applies to both."""
    return max([int(adapter.config["r"]), *(adapter.tensors[update.a].shape[0] for update in adapter.updates.values())])


def refuse_unserved(adapter: Adapter) -> None:
    """Refuse an adapter with features that vLLM does not apply (vllm/lora/peft_helper.py).

    Raises:
        AdapterError: the adapter has DoRA, biases, replaced modules or embeddings, or too large a rank.
    """
    unserved = {
        "use_dora": adapter.config.get("use_dora"),
        "lora_bias": adapter.config.get("lora_bias"),
        "bias": adapter.config.get("bias", "none") != "none",
        "modules_to_save": adapter.config.get("modules_to_save"),
        "an embedding": any("lora_embedding" in name for name in adapter.tensors),
        f"a rank over {VLLM_RANKS[-1]}": _get_rank(adapter) > VLLM_RANKS[-1],
    }
    for feature, is_there in unserved.items():
        if is_there:
            raise AdapterError(f"{adapter.path}: {feature} is not applied by vLLM", "backend: hf")


def measure_distance(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> float:
    """Return the largest difference of a token's logprob between two lists of answers.

    A token listed by one side only is compared with the other side's smallest logprob.
    """
    return max(
        abs(a.get(token, min(a.values())) - b.get(token, min(b.values())))
        for a, b in zip(one, other, strict=True)
        for token in {**a, **b}
    )


def _ask(model: Any) -> list[dict[str, float]]:
    """Return the logprobs of the most likely first tokens of each probe's answer."""
    from inspect_ai.model import GenerateConfig

    config = GenerateConfig(max_tokens=1, temperature=0, logprobs=True, top_logprobs=_TOP)

    async def ask() -> list[dict[str, float]]:
        outputs = [await model.generate(probe, config=config) for probe in _PROBES]
        tops = [output.choices[0].logprobs.content[0].top_logprobs for output in outputs]
        return [{top.token: top.logprob for top in listed} for listed in tops]

    return asyncio.run(ask())
