"""Write the adapter that a recipe of torchtune begins with, under PEFT's names: drawn by its seed, and not trained."""

import argparse
import json
import shutil
from pathlib import Path

from torchtune_recipe import set_up

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--recipe", type=Path, required=True)
parser.add_argument("--state", type=Path, required=True, help="where torchtune may write")
parser.add_argument("--output", type=Path, required=True)
arguments = parser.parse_args()

config, recipe = set_up(arguments.recipe, arguments.state)
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
