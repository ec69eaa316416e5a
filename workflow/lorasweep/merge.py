"""Merging a LoRA adapter into its base model: one ordinary Hugging Face checkpoint."""

import json
import shutil
from pathlib import Path

from lorasweep.adapter import check_injected, read_adapter
from lorasweep.checkpoint import read_checkpoint
from lorasweep.digest import digest_file
from lorasweep.files import give_default_mode
from lorasweep.layout import RECORD
from lorasweep.versions import get_versions


def merge(base: Path, adapter: Path, output: Path, dtype: str) -> None:
    """Write base + (alpha / r) · B·A to `output`, in the given precision, as PEFT's `merge_and_unload` makes it.

    The directory appears whole or not at all. It carries the tokenizer, no adapter file (transformers would apply the
    adapter once more on top of the merged weights), and a record of what it was made of.

    Raises:
        AdapterError: the adapter cannot be applied to this base model, or was not.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lorasweep.probe import DTYPES

    checkpoint = read_checkpoint(base)
    weights = read_adapter(adapter, checkpoint)
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[dtype])
        injected = PeftModel.from_pretrained(model, str(adapter))
        tensors = check_injected(weights, injected.state_dict())
        with torch.inference_mode():
            merged = injected.merge_and_unload(safe_merge=True)
        merged.save_pretrained(aside)
        for name in checkpoint.tokenizer_files:
            shutil.copyfile(base / name, aside / name)
        for file in aside.iterdir():
            give_default_mode(file)
        record = {
            "base_model": str(base),
            "base_model_fingerprint": checkpoint.fingerprint,
            "adapter_sha256": weights.sha256,
            "adapter_tensors": tensors,
            "dtype": dtype,
            "versions": get_versions("torch", "transformers", "peft"),
            "sha256": {file.name: digest_file(file) for file in sorted(aside.iterdir())},
        }
        (aside / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        if output.exists():
            shutil.rmtree(output)
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
