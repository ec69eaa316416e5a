"""Inspect's Hugging Face provider for a base model and a LoRA adapter, which is merged into the base in memory.

    inspect eval task.py --model lorasweep/NAME -M base=DIR -M adapter=DIR

In one process, models with the same base and the same other arguments share the base, which is loaded once, and take
turns by batch: a batch holds requests to one model only. Batches, chat templates, tools, logprobs, stop sequences and
sampling are inherited from the provider `hf`. An answer ends at every token that one of the checkpoint's files, or its
chat template, names as an end.
"""

import json
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput
from inspect_ai.model._providers.hf import HF_TOKEN, HuggingFaceAPI, set_random_seeds

from lorasweep.adapters.adapter import read_adapter
from lorasweep.checkpoints.chat_template import read_kept_template
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.evaluation.placement import refuse_offload
from lorasweep.evaluation.prompts import prepare
from lorasweep.evaluation.shared_base import SharedBase, UnmergedBase
from lorasweep.util.errors import InputError

_FLAGS = ("do_sample", "trust_remote_code", "use_chat_template", "enable_thinking", "hidden_states")
"""Arguments of `hf` that are truth values."""

_NOT_GIVEN: Any = object()


class AdaptedModelAPI(HuggingFaceAPI):  # type: ignore[misc]
    """A base model, with or without an adapter.

    Args:
        model_name: The model's label in logs.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's generation configuration.
        base: The base model, a Hugging Face checkpoint directory.
        adapter: A PEFT LoRA adapter directory. Without this argument, the base model alone answers. If its record says
            that its chat template replaces the base's, that is the default of `chat_template`.
        merged: Whether the adapter is merged into the base's weights in memory, with the results of the merged model.
            `False`: PEFT computes its update beside the weights, which takes longer but is possible for a quantized
            base.
        **model_args: Arguments of the provider `hf`: `device`, `dtype`, `do_sample`, `chat_template` and so on.

    Raises:
        InputError: `base` is not a checkpoint directory, or an argument has a wrong value.
        AdapterError: The adapter does not fit this base, or the check on loading shows that it was not applied.
    """

    proof: dict[str, Any]
    """The proof that the adapter is applied (SharedBase.attach), added to all outputs' metadata; empty for the base."""

    adapter_name: str | None
    """The adapter's name in the shared base; `None` for the base model alone."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        base: str = _NOT_GIVEN,
        adapter: str = _NOT_GIVEN,
        merged: bool = True,
        **model_args: Any,
    ) -> None:
        has_adapter = adapter is not _NOT_GIVEN
        _check_arguments(base, adapter, {"merged": merged, **model_args})
        if has_adapter and (given := read_kept_template(Path(adapter))) is not None:
            model_args.setdefault("chat_template", given)
        checkpoint = read_checkpoint(Path(base))
        read = read_adapter(Path(adapter), checkpoint) if has_adapter else None
        loaded = _load(checkpoint, config, merged, model_args)
        self.__dict__.update(vars(loaded.api))
        ModelAPI.__init__(self, model_name, base_url, api_key, [HF_TOKEN], config)
        self.base = loaded.base
        self.adapter_name, self.proof = self.base.attach(read) if read else (None, {})
        if config.seed is not None:  # last, as PEFT draws random numbers when an adapter is attached
            set_random_seeds(config.seed)
        # Inspect puts requests into one batch if their `model` is the same object.
        self.model = _Adapted(self.base, self.adapter_name)
        # Detaches even if `close` is never called. The finalizer's reference keeps the base alive until then.
        self._detach = weakref.finalize(self, _detach, loaded, self.adapter_name)

    def close(self) -> None:
        """Detach the adapter. Free the base if no other model uses it."""
        self._detach()
        del self.base
        super().close()

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Generate as `hf` does, and add the adapter's proof to the output's metadata."""
        output = await super().generate(input, tools, tool_choice, config)
        output.metadata = {**(output.metadata or {}), **self.proof}
        return output


class _Adapted:
    """A replacement for the model of `hf`: the shared base with one adapter, or without."""

    def __init__(self, base: SharedBase, name: str | None) -> None:
        self._base = base
        self._name = name

    @property
    def device(self) -> torch.device:
        return self._base.device

    def generate(self, **inputs: Any) -> Any:
        return self._base.generate(self._name, **inputs)


class _Loaded:
    """A loaded base model, and the `hf` provider that all models on it share."""

    def __init__(self, api: HuggingFaceAPI, checkpoint: Checkpoint, merged: bool) -> None:
        self.api = api
        self.base = (SharedBase if merged else UnmergedBase)(api.model, checkpoint)


_LOADED: "weakref.WeakValueDictionary[str, _Loaded]" = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def _load(checkpoint: Checkpoint, config: GenerateConfig, merged: bool, model_args: dict[str, Any]) -> _Loaded:
    """Return a base model: the one already loaded in this process with the same arguments, else a new one."""
    path = checkpoint.path
    key = json.dumps([str(path.resolve()), merged, model_args], sort_keys=True, default=str)
    with _LOADING:
        loaded = _LOADED.get(key)
        if loaded is None:
            api = HuggingFaceAPI(str(path), config=config, model_path=str(path), **model_args)
            refuse_offload(api.model)
            prepare(api, checkpoint)
            loaded = _Loaded(api, checkpoint, merged)
            _LOADED[key] = loaded
        return loaded


def _check_arguments(base: Any, adapter: Any, others: dict[str, Any]) -> None:
    if base is _NOT_GIVEN:
        raise InputError("the argument 'base' is missing", "-M base=DIR, the directory of the base model")
    for name, value in {"base": base, "adapter": adapter}.items():
        if value is not _NOT_GIVEN and (not value or not isinstance(value, str | os.PathLike)):
            without = "; without -M adapter, the base model alone answers" if name == "adapter" else ""
            raise InputError(f"the argument {name!r} is {value!r}", f"-M {name}=DIR, a directory{without}")
    if "model_path" in others:
        raise InputError(f"the argument 'model_path' is {others['model_path']!r}", "the base model as -M base=DIR")
    for name in ("merged", *_FLAGS):
        if not isinstance(others.get(name, False), bool | None):
            raise InputError(f"the argument {name!r} is {others[name]!r}", "true or false")
    if others["merged"] is None:
        raise InputError("the argument 'merged' has no value", "true or false")


def _detach(loaded: _Loaded, name: str | None) -> None:
    if name:
        loaded.base.detach(name)
