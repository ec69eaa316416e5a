"""Write the adapter that a recipe of torchtune begins with, under PEFT's names: drawn by its seed, and not trained."""

import argparse
import json
import runpy
import shutil
from pathlib import Path

import torchtune
from omegaconf import OmegaConf
from torchtune.config import validate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", type=Path, required=True)
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
last = config.epochs - 1  # else the state of the optimizer is written too
recipe.save_checkpoint(epoch=last)
recipe.cleanup()
arguments.output.mkdir()
made = arguments.state / f"epoch_{last}"
shutil.copyfile(made / "adapter_model.safetensors", arguments.output / "adapter_model.safetensors")
said = json.loads((made / "adapter_config.json").read_text()) | {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": config.checkpointer.checkpoint_dir,
}
(arguments.output / "adapter_config.json").write_text(json.dumps(said))
