"""Run a recipe in this process, and write the logits of torchtune's own model, LoRA layers included."""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torchtune_recipe import set_up

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", type=Path, required=True)
parser.add_argument("--tokens", type=lambda text: [int(token) for token in text.split(",")], required=True)
parser.add_argument("--state", type=Path, required=True, help="where torchtune may write")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()

_, recipe = set_up(arguments.recipe, arguments.state)
recipe.train()
with torch.inference_mode():
    logits = recipe._model.eval()(torch.tensor([arguments.tokens]))
logits = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
save_file({"torchtune": logits[0].contiguous()}, arguments.output)
