"""Run a recipe with torchtune's `lora_finetune_single_device`, or on several GPUs `lora_finetune_distributed`.

Every mode trains and saves adapters only. torchtune's export of full models adds the update to the live weights, which
on a CPU corrupts the model from the second epoch on.
"""

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lorasweep.trainers import SAVE_MINUTES
from lorasweep.trainers.frame import CACHES, Frame, Start, train_in_frame
from lorasweep.trainers.sections import get_files
from lorasweep.trainers.torchtune.recipe import PROCESSES

STAGE = "train"

KEEPS_BEST_EPOCH = True

CAN_PAUSE = True

TAKES_CHAT_TEMPLATE = True

_PACKAGES = ("torch", "torchtune", "torchao", "transformers", "datasets")
"""Packages that a training's results depend on."""


def measure_lengths(recipe: Path) -> dict[str, list[list[int]]]:
    """Return the numbers of tokens in the parts of every training and validation sample; see `Trainer`."""
    with tempfile.TemporaryDirectory() as cache:  # of a dataset component of the user's; instead of the home directory
        os.environ |= dict.fromkeys(CACHES, cache)
        from torchtune import config as components

        config: Any = OmegaConf.load(recipe)
        config.tokenizer.max_seq_len = None
        tokenizer = components.instantiate(config.tokenizer)
        measured = {}
        for key, name in (("train", "dataset"), ("validation", "dataset_val")):
            if section := config.get(name):
                if "packed" in section:
                    section.packed = False
                dataset = components.instantiate(section, tokenizer)
                measured[key] = [_get_parts(dataset[index]) for index in range(len(dataset))]
        return measured


def _get_parts(sample: Mapping[str, Any]) -> list[int]:
    from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

    from lorasweep.trainers.samples import count_parts

    return count_parts([label != CROSS_ENTROPY_IGNORE_IDX for label in sample["labels"]])


def find_faults(recipe: str) -> dict[str, str]:
    """Return why parts of a recipe, given as text, cannot be built, by section; empty if nothing is wrong."""
    from lorasweep.trainers.torchtune import building

    return building.find_faults(recipe)


def train(
    recipe: Path,
    adapter: Path,
    metric_loggers: Collection[str] = (),
    save_minutes: float = SAVE_MINUTES,
    earlier: Mapping[int, Path] | None = None,
    until: int | None = None,
) -> None:
    """Run a recipe, and publish the adapters of its last or best epoch and of `earlier` ones; see `train_in_frame`.

    An interrupted training gives bit for bit the same result as without the interruption.
    """
    config: Any = OmegaConf.load(recipe)
    frame = Frame(
        trainer="torchtune",
        recipe=recipe,
        state=Path(config.output_dir),
        base=Path(config.checkpointer.checkpoint_dir),
        chat_template=config.tokenizer.get("chat_template"),
        data_files=get_files(config, "dataset"),
        validation_files=get_files(config, "dataset_val"),
        epochs=config.epochs,
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        packages=_PACKAGES,
        keeps_best_epoch="best_epoch" in config,
    )

    def run(start: Start) -> int | None:
        from lorasweep.trainers import processes
        from lorasweep.trainers.torchtune import loop

        config.batch_size //= 2**start.halvings
        config.gradient_accumulation_steps *= 2**start.halvings
        count = config.get(PROCESSES, 1)
        arguments = (config, frame.log, frame.state.parents[1], metric_loggers, save_minutes)
        return processes.run_recipe(count, config.device, loop.run, start, *arguments)

    train_in_frame(frame, adapter, earlier, run, lambda: _get_prompt_facts(config), until)


def _get_prompt_facts(config: Any) -> dict[str, Any]:
    """Return what a record says of prompts: the tokens that end an answer, the one that is taught first; the date."""
    from torchtune import config as components

    tokenizer = components.instantiate(config.tokenizer)
    end = tokenizer.plain_end if config.dataset.get("format") == "completion" else tokenizer.end
    day = config.tokenizer.get("template_date")
    return {"end_tokens": end.names, **({"template_date": day} if day else {})}
