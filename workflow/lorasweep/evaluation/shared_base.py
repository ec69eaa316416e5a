"""One base model in memory with any number of LoRA adapters: attached, switched by batch, detached.

The base is loaded once and never changed. An adapter takes memory for its own tensors, freed when it is detached.
Attaching checks that the model holds the adapter's tensors bit for bit, and that the adapter changes the logits.
"""

import threading
from itertools import count
from typing import Any

import torch
from peft import PeftConfig, PeftModel

from lorasweep.adapters.adapter import Adapter, AdapterError, check_injected
from lorasweep.evaluation.probe import measure_effect, probe_logits


class SharedBase:
    """A transformers model that several adapters share.

    All methods are thread-safe: one runs at a time.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._peft: PeftModel | None = None
        self._active: str | None = None
        self._attached: set[str] = set()
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

        The proof has `adapter_sha256`, the digest of the weights file; `adapter_tensors`, the number of its tensors
        that the model holds unchanged; and `probe_distance`, the largest difference of a logit from the base's on the
        probe's tokens.

        Raises:
            AdapterError: the adapter would change the shared base, was not loaded completely, or has no effect.
        """
        _refuse_changes_of_the_base(adapter)
        with self._lock:
            name = next(self._names)
            try:
                if self._peft is None:
                    config = PeftConfig.from_pretrained(str(adapter.path))
                    config.inference_mode = True
                    self._peft = PeftModel(self._model, config, adapter_name=name)
                self._attached.add(name)
                # PEFT's default: an adapter in a higher precision than the base keeps its own.
                self._peft.load_adapter(str(adapter.path), name, torch_device=str(self.device))
                tensors = check_injected(adapter, self._peft.state_dict(), name)
                distance = measure_effect(adapter, self.probe(name), self.logits)
            except BaseException:
                self.detach(name)
                raise
        return name, {"adapter_sha256": adapter.sha256, "adapter_tensors": tensors, "probe_distance": distance}

    def detach(self, name: str) -> None:
        """Detach an adapter and free its memory. Does nothing if the adapter is not attached."""
        with self._lock:
            self._attached.discard(name)
            if self._active == name:
                self._active = None
            if self._peft is not None and name in self._peft.peft_config:
                self._peft.delete_adapter(name)

    def probe(self, name: str | None) -> torch.Tensor:
        """Return the logits on the probe's tokens with an adapter; `None`: with the base alone."""
        with self._lock:
            self._activate(name)
            return probe_logits(self._model)

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

    def _activate(self, name: str | None) -> None:
        if self._peft is None or not self._attached:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        elif name != self._active:
            self._peft.base_model.enable_adapter_layers()
            self._peft.set_adapter(name, inference_mode=True)
        self._active = name


def _refuse_changes_of_the_base(adapter: Adapter) -> None:
    if adapter.replaced:
        raise AdapterError(
            f"{adapter.path}: the adapter replaces '{next(iter(adapter.replaced))}' in the base model (bias, "
            "modules_to_save), which other adapters share",
            "merge_adapters: true",
        )
