"""Set torchtune's recipe up in this process, for scripts that look at it."""

import runpy
from pathlib import Path
from typing import Any

import torchtune
from omegaconf import OmegaConf
from torchtune.config import validate


def set_up(recipe: Path, state: Path) -> tuple[Any, Any]:
    """Return a recipe's configuration, and the recipe with its model loaded; it writes to `state` alone."""
    config: Any = OmegaConf.load(recipe)
    config.output_dir = config.checkpointer.output_dir = str(state)
    config.metric_logger.log_dir = str(state / "logs")
    validate(config)
    # Recipes are scripts of a folder beside the package, not to be imported.
    script = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
    made = runpy.run_path(str(script))["LoRAFinetuneRecipeSingleDevice"](cfg=config)
    made.setup(cfg=config)
    return config, made
