"""Inspect's Hugging Face provider for a base model and a LoRA adapter, without a merged model.

    inspect eval task.py --model lorasweep/NAME -M base=DIR -M adapter=DIR

Models of one process that have the same base and the same other arguments share it: it is loaded once. The provider
`hf` does the rest by its own code: batches, chat templates, tools, logprobs, stop sequences, sampling. A batch has the
requests to one model.
"""

import json
import threading
import weakref
from pathlib import Path
from typing import Any

import torch
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput
from inspect_ai.model._providers.hf import HF_TOKEN, HuggingFaceAPI, set_random_seeds

from lorasweep.adapters.adapter import read_adapter
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.shared_base import SharedBase


class AdaptedModelAPI(HuggingFaceAPI):  # type: ignore[misc]
    """A model that is a base and, if one is named, an adapter on it.

    Args:
        model_name: A label: what logs call the model.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's configuration of generation.
        base: The base model, a Hugging Face checkpoint directory.
        adapter: A PEFT LoRA adapter directory; none: the base as it is.
        **model_args: Those of the provider `hf`: `device`, `dtype`, `do_sample`, `chat_template` and so on.

    Raises:
        InputError: The base is no checkpoint directory.
        AdapterError: The adapter cannot be applied to this base, or was not: it is proven on loading.
    """

    proof: dict[str, Any]
    """What says that the adapter acts (SharedBase.attach); empty for the base. It is in the metadata of each output."""

    adapter_name: str | None
    """What the shared base calls the adapter; None for the base."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        base: str,
        adapter: str | None = None,
        **model_args: Any,
    ) -> None:
        checkpoint = read_checkpoint(Path(base))
        read = read_adapter(Path(adapter), checkpoint) if adapter else None
        loaded = _load(checkpoint.path, config, model_args)
        self.__dict__.update(vars(loaded.api))
        ModelAPI.__init__(self, model_name, base_url, api_key, [HF_TOKEN], config)
        self.base = loaded.base
        self.adapter_name, self.proof = self.base.attach(read) if read else (None, {})
        if config.seed is not None:  # at last: PEFT draws numbers when an adapter is attached
            set_random_seeds(config.seed)
        # Inspect batches by the identity of what it calls the model.
        self.model = _Adapted(self.base, self.adapter_name)
        # Also when nobody closes it. This holds the base, and so the base lasts as long as a model that needs it.
        self._detach = weakref.finalize(self, _detach, loaded, self.adapter_name)

    def close(self) -> None:
        """Drop the adapter; and the base, if no other model has it."""
        self._detach()
        del self.base
        super().close()

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Generate as `hf` does; the output's metadata says which adapter made it."""
        output = await super().generate(input, tools, tool_choice, config)
        output.metadata = {**(output.metadata or {}), **self.proof}
        return output


class _Adapted:
    """What stands where `hf` has its model: the base with one adapter, or none."""

    def __init__(self, base: SharedBase, name: str | None) -> None:
        self._base = base
        self._name = name

    @property
    def device(self) -> torch.device:
        return self._base.device

    def generate(self, **inputs: Any) -> Any:
        return self._base.generate(self._name, **inputs)


class _Loaded:
    """A base model, and what its models share."""

    def __init__(self, api: HuggingFaceAPI) -> None:
        self.api = api
        self.base = SharedBase(api.model)


_LOADED: "weakref.WeakValueDictionary[str, _Loaded]" = weakref.WeakValueDictionary()
_LOADING = threading.Lock()


def _load(path: Path, config: GenerateConfig, model_args: dict[str, Any]) -> _Loaded:
    """Load a base model, unless a model of this process has it with the same arguments."""
    key = json.dumps([str(path.resolve()), model_args], sort_keys=True, default=str)
    with _LOADING:
        loaded = _LOADED.get(key)
        if loaded is None:
            loaded = _Loaded(HuggingFaceAPI(str(path), config=config, model_path=str(path), **model_args))
            _LOADED[key] = loaded
        return loaded


def _detach(loaded: _Loaded, name: str | None) -> None:
    if name:
        loaded.base.detach(name)
