"""Inspect's Hugging Face provider for a base model and a LoRA adapter, without a merged model.

    inspect eval task.py --model lorasweep/NAME -M base=DIR -M adapter=DIR

Models of one process that have the same base and the same other arguments share it: it is loaded once. Whatever the
provider `hf` does (batches, chat templates, tools, logprobs, stop sequences, sampling) is done by its own code; here
lies only which adapter generates which request.
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
from lorasweep.evaluation.request_batches import join_batch
from lorasweep.evaluation.shared_base import SharedBase, can_share_batches


class AdaptedModelAPI(HuggingFaceAPI):  # type: ignore[misc]
    """A model that is a base and, if one is named, an adapter on it.

    Args:
        model_name: A label: what logs call the model.
        base_url: Not used.
        api_key: Not used.
        config: Inspect's configuration of generation.
        base: The base model, a Hugging Face checkpoint directory.
        adapter: A PEFT LoRA adapter directory; none: the base as it is.
        mixed_batches: Whether requests to several adapters that wait at the same time are generated in one batch, each
            row under its adapter: faster where each adapter has few requests. Adapters with DoRA or `lora_bias` have
            batches of their own in any case.
        **model_args: Those of the provider `hf`: `device`, `dtype`, `do_sample`, `chat_template` and so on.

    Raises:
        InputError: The base is no checkpoint directory.
        AdapterError: The adapter cannot be applied to this base, or was not: it is proven on loading.
    """

    proof: dict[str, Any]
    """What says that the adapter acts (SharedBase.attach); none for the base. It is in the metadata of each output."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        *,
        base: str,
        adapter: str | None = None,
        mixed_batches: bool = True,
        **model_args: Any,
    ) -> None:
        checkpoint = read_checkpoint(Path(base))
        read = read_adapter(Path(adapter), checkpoint) if adapter else None
        loaded = _load(checkpoint.path, config, model_args)
        self.__dict__.update(vars(loaded.api))
        ModelAPI.__init__(self, model_name, base_url, api_key, [HF_TOKEN], config)
        self.base = loaded.base
        self.tokenizer = loaded.tokenizer
        self._name: str | None = None
        self.proof = {}
        if read:
            self._name, self.proof = self.base.attach(read)
        if config.seed is not None:  # at last: PEFT draws numbers when an adapter is attached
            set_random_seeds(config.seed)
        can_mix = mixed_batches and (read is None or can_share_batches(read))
        # Inspect batches by the identity of what it calls the model.
        self.model = loaded.rows if can_mix else _Rows(loaded.base, loaded.tokenizer)
        # Also when nobody closes it. This holds the base, and so the base lasts as long as a model that needs it.
        self._detach = weakref.finalize(self, _detach, loaded, self._name)

    def close(self) -> None:
        """Drop the adapter; and the base, if no other model has it."""
        self._detach()
        del self.base
        super().close()

    def hf_chat(self, messages: Any, tools: Any) -> str:
        """Return the prompt as `hf` makes it, with the adapter that is to answer it."""
        return _Prompt(super().hf_chat(messages, tools), self._name)

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Generate as `hf` does; the output's metadata says which adapter made it."""
        async with join_batch(self.model, config.max_connections or self.max_connections()) as size:
            batched = config.model_copy(update={"max_connections": size})
            output = await super().generate(input, tools, tool_choice, batched)
        output.metadata = {**(output.metadata or {}), **self.proof}
        return output


class _Prompt(str):
    """A prompt that knows which adapter is to answer it."""

    __slots__ = ("adapter",)
    adapter: str | None

    def __new__(cls, text: str, adapter: str | None) -> "_Prompt":
        prompt = super().__new__(cls, text)
        prompt.adapter = adapter
        return prompt


class _Tokenizer:
    """A tokenizer that remembers which adapters the prompts of a batch are for, until that batch is generated."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._batch = threading.local()

    def __call__(self, texts: Any, **options: Any) -> Any:
        self._batch.adapters = []
        if isinstance(texts, list) and all(isinstance(text, _Prompt) for text in texts):
            self._batch.adapters = [text.adapter for text in texts]
        return self._tokenizer(texts, **options)

    @property
    def adapters(self) -> list[str | None]:
        """Of the batch that was tokenized last by this thread; none for other texts than prompts."""
        adapters: list[str | None] = self._batch.adapters
        return adapters

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class _Rows:
    """What stands where `hf` has its model: it generates each row of a batch under the adapter of its prompt."""

    def __init__(self, base: SharedBase, tokenizer: _Tokenizer) -> None:
        self._base = base
        self._tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        return self._base.device

    def generate(self, **inputs: Any) -> Any:
        return self._base.generate(self._tokenizer.adapters, **inputs)


class _Loaded:
    """A base model, and what its models share."""

    def __init__(self, api: HuggingFaceAPI) -> None:
        self.api = api
        self.base = SharedBase(api.model)
        self.tokenizer = _Tokenizer(api.tokenizer)
        self.rows = _Rows(self.base, self.tokenizer)


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
