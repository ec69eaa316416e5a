"""Evaluation through Inspect's own provider for vLLM: one server for a base model and all adapters of it.

Inspect starts the server, loads adapters into it, and stops it (inspect_ai/model/_providers/vllm.py). What is said here
is what it cannot know: which rank the server must be ready for, what vLLM does not apply, and that it did apply.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.adapters.adapter import Adapter, AdapterError, read_adapter
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.tensors import get_torch_name
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.util.errors import InputError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank` (vllm/config/lora.py): an adapter of another rank needs the next larger one."""

_PROBES = ("The", "1 + 1 =", "Once upon a time", "def main():")
"""What base and adapter are asked, to see that their answers differ."""

_TOP = 20
"""Logprobs of the first token to look at: as many as vLLM gives unless it is told otherwise."""


@contextmanager
def open_server(spec: EvaluationSpec, base: Checkpoint, points: Sequence[Path]) -> Iterator[Callable[[Path], Any]]:
    """Give a way to open each point's model on one server; it starts with the first, and stops at the end."""
    adapters = {}
    for point in points:
        try:
            adapter = read_adapter(point / "adapter", base)
            refuse_unserved(adapter)
        except AdapterError:  # it fails when it is opened, and alone
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
                f"{adapter.path}: the adapter has no effect: logprobs of vLLM's answers differ by {distance} from the "
                f"base's, which differ by {noise} when it is asked twice"
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
    """Make the Inspect model; the server is started by the first that is asked, with what the first one says."""
    from inspect_ai.model import get_model

    name = f"vllm/{base.path.resolve()}"
    if adapter:
        name += f":{adapter.path.resolve()}"
    if name.count(":") > bool(adapter):
        raise InputError(f"{name}: vLLM's names have ':' between base and adapter", "paths without it")
    return get_model(
        name,
        memoize=False,
        config=spec.make_generate_config(temperature=spec.temperature),
        **get_server_args(spec, base, all_adapters),
    )


def get_server_args(spec: EvaluationSpec, base: Checkpoint, adapters: Collection[Adapter]) -> dict[str, Any]:
    """Return the arguments of `vllm serve`, as Inspect takes them.

    Inspect itself would pass the largest `r` of the adapters' configurations; but an adapter can have a larger rank in
    `rank_pattern`, and vLLM takes some numbers only. vLLM asks of both, the configuration and the pattern.
    """
    arguments: dict[str, Any] = {"dtype": get_torch_name(spec.dtype), "seed": spec.seed}
    if adapters:
        rank = max(map(_get_rank, adapters))
        arguments |= {"enable_lora": True, "max_lora_rank": next(taken for taken in RANKS if rank <= taken)}
    if not base.has_chat_template:
        arguments["use_chat_template"] = False
    return arguments


def _get_rank(adapter: Adapter) -> int:
    """The largest rank of an adapter, by its configuration and by its tensors: vLLM asks of both."""
    return max([int(adapter.config["r"]), *(adapter.tensors[update.a].shape[0] for update in adapter.updates.values())])


def refuse_unserved(adapter: Adapter) -> None:
    """Refuse what vLLM does not apply (vllm/lora/peft_helper.py), by name.

    Raises:
        AdapterError: DoRA, biases, whole modules or embeddings that are replaced, too large a rank.
    """
    unserved = {
        "use_dora": adapter.config.get("use_dora"),
        "lora_bias": adapter.config.get("lora_bias"),
        "bias": adapter.config.get("bias", "none") != "none",
        "modules_to_save": adapter.config.get("modules_to_save"),
        "an embedding": any("lora_embedding" in name for name in adapter.tensors),
        f"a rank over {RANKS[-1]}": _get_rank(adapter) > RANKS[-1],
    }
    for feature, is_there in unserved.items():
        if is_there:
            raise AdapterError(f"{adapter.path}: {feature} is not applied by vLLM", "backend: hf")


def measure_distance(one: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> float:
    """Return the largest difference of a token's logprob; of one that only one of them lists, to the other's least."""
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
