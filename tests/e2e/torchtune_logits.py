"""Run a recipe in this process, and write the logits of torchtune's own model, LoRA layers included."""

import argparse
import runpy
from pathlib import Path

import torch
import torchtune
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune.config import validate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", type=Path, required=True)
parser.add_argument("--tokens", type=lambda text: [int(token) for token in text.split(",")], required=True)
parser.add_argument("--state", type=Path, required=True, help="where torchtune may write")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()

config = OmegaConf.load(arguments.recipe)
config.output_dir = config.checkpointer.output_dir = str(arguments.state)
config.metric_logger.log_dir = str(arguments.state / "logs")
validate(config)
# Recipes are scripts of a folder beside the package, not to be imported.
script = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
recipe = runpy.run_path(str(script))["LoRAFinetuneRecipeSingleDevice"](cfg=config)
recipe.setup(cfg=config)
recipe.train()
with torch.inference_mode():
    logits = recipe._model.eval()(torch.tensor([arguments.tokens]))
logits = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
save_file({"torchtune": logits[0].contiguous()}, arguments.output)
