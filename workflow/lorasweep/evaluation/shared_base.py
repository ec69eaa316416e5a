"""One base model in memory with any number of LoRA adapters, of which one acts at a time.

The base is loaded once. An adapter is merged into it when its turn comes, and gives way to the next one: see
lorasweep.adapters.in_memory. Attaching checks that every tensor of the adapter is applied, that the weights move, and
that the adapter changes the logits.
"""

import threading
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from lorasweep.adapters.adapter import Adapter, AdapterError, check_injected
from lorasweep.adapters.in_memory import ModelInMemory
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.evaluation.probe import choose_tokens, measure_effect, probe_logits
from lorasweep.layout import ADAPTER_WEIGHTS
from lorasweep.util.files import get_state

_NOBODY = ""
"""The active adapter after it was detached, or could not be merged."""


class SharedBase:
    """A transformers model that several adapters share, loaded from a checkpoint.

    All methods are thread-safe: one runs at a time.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._in_memory: ModelInMemory | None = None
        self._active: str | None = None
        self._attached: dict[str, tuple[Adapter, Any]] = {}  # with the state of the weights file
        self._names = (f"adapter_{number}" for number in count())
        self._lock = threading.RLock()
        self.logits = probe_logits(model)
        """The base's logits on the probe's tokens: float32 of shape [tokens, vocabulary]."""

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def attached(self) -> int:
        """The number of attached adapters."""
        return len(self._attached)

    def attach(self, adapter: Adapter) -> tuple[str, dict[str, Any]]:
        """Attach an adapter. Return its name in this model, and the proof that it is applied.

        The proof has `adapter_sha256`, the digest of the weights file; `adapter_tensors`, the number of its tensors,
        all of which were applied; and `probe_distance`, the largest difference of a logit from the base's on the
        probe's tokens.

        Raises:
            AdapterError: the adapter cannot be applied, was not applied completely, or has no effect.
            InputError: the base model's files have changed, or a merged value is not finite.
        """
        with self._lock:
            name = next(self._names)
            self._attached[name] = adapter, get_state(adapter.path / ADAPTER_WEIGHTS)
            try:
                tokens = choose_tokens(adapter)
                before = self.logits if tokens is None else self.probe(None, tokens)
                tensors = self._add(name, adapter)
                distance = measure_effect(adapter, self.probe(name, tokens), before)
            except BaseException:
                self.detach(name)
                raise
        return name, {"adapter_sha256": adapter.sha256, "adapter_tensors": tensors, "probe_distance": distance}

    def detach(self, name: str) -> None:
        """Detach an adapter. Does nothing if the adapter is not attached."""
        with self._lock:
            if self._attached.pop(name, None):
                self._remove(name)

    def restore(self) -> None:
        """Have the model be its base, and check that it is.

        Raises:
            ChangedBaseError: a weight that an adapter changed differs from the base model's files.
        """
        with self._lock:
            self._activate(None)

    def probe(self, name: str | None, tokens: Sequence[int] | None = None) -> torch.Tensor:
        """Return the logits on the probe's tokens with an adapter; `None`: with the base alone."""
        with self._lock:
            self._activate(name)
            return probe_logits(self._model, tokens)

    def generate(self, name: str | None, **inputs: Any) -> Any:
        """Call transformers' `generate` with an adapter; `None`: with the base alone.

        `inputs` are the arguments of `generate`, with `input_ids` of shape [rows, tokens].

        Raises:
            ValueError: the adapter is not attached.
        """
        with self._lock:
            if name and name not in self._attached:
                raise ValueError(f"not attached: {name}")
            self._activate(name)
            return self._model.generate(**inputs)

    def _add(self, name: str, adapter: Adapter) -> int:
        """Have an adapter act; return the number of its tensors that are applied."""
        if self._in_memory is None:
            self._in_memory = ModelInMemory(self._model, self._checkpoint)
        self._active = _NOBODY  # also if the merge fails
        tensors = self._in_memory.merge(adapter)
        self._active = name
        return tensors

    def _remove(self, name: str) -> None:
        if self._active == name:
            self._active = _NOBODY  # restored when the base has its turn, and overwritten when an adapter has

    def _activate(self, name: str | None) -> None:
        if name == self._active or self._in_memory is None:
            return
        if name is not None:
            adapter, state = self._attached[name]
            if get_state(adapter.path / ADAPTER_WEIGHTS) != state:
                raise AdapterError(f"{adapter.path}: the adapter has changed since it was attached")
            self._add(name, adapter)
            return
        self._active = _NOBODY
        self._in_memory.restore()
        self._active = None


class UnmergedBase(SharedBase):
    """A base whose weights stay as they are, such as a quantized one. PEFT computes the updates beside them."""

    _peft: PeftModel | None = None

    def _add(self, name: str, adapter: Adapter) -> int:
        if adapter.replaced:
            raise AdapterError(
                f"{adapter.path}: the adapter replaces '{next(iter(adapter.replaced))}' in the base model (bias, "
                "modules_to_save), which other adapters share",
                "merged=true",
            )
        if self._peft is None:
            config = PeftConfig.from_pretrained(str(adapter.path))
            config.inference_mode = True
            self._peft = PeftModel(self._model, config, adapter_name=name)
        # PEFT's default: an adapter in a higher precision than the base keeps its own.
        self._peft.load_adapter(str(adapter.path), name, torch_device=str(self.device))
        return check_injected(adapter, self._peft.state_dict(), name)

    def _remove(self, name: str) -> None:
        if self._active == name:
            self._active = _NOBODY
        if self._peft is not None and name in self._peft.peft_config:
            self._peft.delete_adapter(name)

    def _activate(self, name: str | None) -> None:
        if self._peft is None or not self._attached:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        elif name != self._active:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)
        self._active = name
        # PEFT freezes the base. On a CPU, torch multiplies by a frozen head row by row, each time with a copy of it.
        for key, parameter in self._model.named_parameters():
            if ".lora_" not in key and parameter.is_floating_point():
                parameter.requires_grad_(True)
