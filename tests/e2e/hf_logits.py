"""Write the logits, on fixed tokens, of a base model, of a merged one, and of the base with an adapter by PEFT.

A model is a folder, or a name on the hub.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--merged", required=True)
parser.add_argument("--tokens", type=lambda text: [int(token) for token in text.split(",")], required=True)
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()


def load(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


models = {
    "base": lambda: load(arguments.base),
    "merged": lambda: load(arguments.merged),
    "peft": lambda: PeftModel.from_pretrained(load(arguments.base), arguments.adapter),
    # As it lies there: transformers finds the base by the adapter's own configuration.
    "transformers": lambda: load(arguments.adapter),
}
with torch.inference_mode():
    tokens = torch.tensor([arguments.tokens])
    save_file({name: make().eval()(tokens).logits[0].contiguous() for name, make in models.items()}, arguments.output)
