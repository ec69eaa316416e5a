"""The probe: a model's logits on fixed tokens, to check that an adapter changes them."""

import gc
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorasweep.adapters.adapter import Adapter, AdapterError
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.dtypes import PRECISIONS
from lorasweep.checkpoints.tensors import DTYPES
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.util.files import give_default_mode

_LENGTH = 32


def choose_tokens(adapter: Adapter) -> list[int] | None:
    """Return the tokens of the probe for an adapter; `None`: the fixed ones.

    An adapter on embeddings alone may change none of the fixed ones: it is trained on the tokens of its samples.
    """
    sides = [update.a for update in adapter.updates.values()]
    if adapter.replaced or adapter.biases or not all("lora_embedding" in side for side in sides):
        return None
    tokens = max(map(adapter.read, sides), key=lambda a: a.shape[1])  # not of GPT-2's positions
    return tokens.any(0).nonzero().flatten()[:_LENGTH].tolist() or None


def probe_logits(model: Any, tokens: Sequence[int] | None = None) -> torch.Tensor:
    """Return the model's logits on some tokens, as float32 of shape [tokens, vocabulary], on the CPU.

    `None`: 32 fixed tokens. A fixed rule spreads them over the vocabulary, so that the probe needs no tokenizer.
    """
    if tokens is None:
        embedding = model.get_input_embeddings()
        embedding = getattr(embedding, "base_layer", embedding)  # LoRA may wrap the embedding
        tokens = [(7919 * (i + 1)) % embedding.num_embeddings for i in range(_LENGTH)]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens], device=model.device)).logits[0].float().cpu()


def measure_effect(adapter: Adapter, logits: torch.Tensor, base: torch.Tensor) -> float:
    """Return the largest absolute difference of a logit from the base's, both of shape [tokens, vocabulary].

    Raises:
        AdapterError: all logits are equal.
    """
    distance = float((logits - base).abs().max())
    if not distance > 0:
        raise AdapterError(f"{adapter.path}: the adapter has no effect: the model's logits are those of its base")
    return distance


def base_logits(
    base: Checkpoint, spec: EvaluationSpec, cache: Path, tokens: Sequence[int] | None = None
) -> torch.Tensor:
    """Return the base model's logits on the probe's tokens, computed once and then read from the folder `cache`.

    The cache's key has the fingerprint, the precision, the tokens, and the kind and number of devices, as a merged
    model must be compared with its base under the same arithmetic.
    """
    from transformers import AutoModelForCausalLM

    kind = torch.cuda.get_device_name() if spec.device == "cuda" else spec.device
    kind += f" {spec.gpus}" if spec.gpus > 1 else ""
    kind += f" {tokens}" if tokens else ""
    key = hashlib.sha256(f"{base.fingerprint} {spec.dtype} {kind} {torch.__version__}".encode()).hexdigest()[:16]
    file = cache / f"{key}.safetensors"
    if not file.is_file():
        dtype = DTYPES[PRECISIONS[spec.dtype]]
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype, device_map=spec.placement)
        cache.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{hashlib.sha256(str(id(model)).encode()).hexdigest()[:8]}.tmp")
        save_file({"logits": probe_logits(model, tokens)}, aside)
        give_default_mode(aside)
        aside.replace(file)
        # A model that is spread over GPUs is part of reference cycles.
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return load_file(file)["logits"]
