"""Run a recipe with TRL's `SFTTrainer`."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from lorasweep.trainers import SAVE_MINUTES
from lorasweep.trainers.frame import Frame, Start, train_in_frame
from lorasweep.trainers.sections import get_files

STAGE = "eval"

KEEPS_BEST_EPOCH = True

CAN_PAUSE = True

TAKES_CHAT_TEMPLATE = True

_PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes")
"""Packages that a training's results depend on."""


def measure_lengths(recipe: Path) -> dict[str, list[list[int]]]:
    """Return the numbers of tokens in the parts of every training and validation sample; see `Trainer`."""
    from lorasweep.trainers.samples import count_parts, tokenize_samples
    from lorasweep.trainers.tokenizer import ChatTokenizer

    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tokenizer = ChatTokenizer(**config["tokenizer"] | {"max_seq_len": None})
    sections = {
        key: config[name] for key, name in (("train", "dataset"), ("validation", "dataset_val")) if name in config
    }
    return {
        key: [count_parts(is_learnt.tolist()) for _, is_learnt in tokenize_samples(tokenizer, **section)]
        for key, section in sections.items()
    }


def find_faults(recipe: str) -> dict[str, str]:
    """Return why parts of a recipe, given as text, cannot be built, by section; empty if nothing is wrong."""
    import tempfile

    from peft import LoraConfig
    from trl import SFTConfig

    from lorasweep.util.errors import describe

    config, faults = yaml.safe_load(recipe), {}
    with tempfile.TemporaryDirectory() as folder:
        for section, build in (("trl", lambda **keys: SFTConfig(output_dir=folder, **keys)), ("lora", LoraConfig)):
            try:
                build(**config[section])
            except Exception as error:  # an argument can be wrong in any way
                faults[section] = describe(error)
    return faults


def train(
    recipe: Path,
    adapter: Path,
    metric_loggers: Collection[str] = (),
    save_minutes: float = SAVE_MINUTES,
    earlier: Mapping[int, Path] | None = None,
    until: int | None = None,
) -> None:
    """Run a recipe, and publish the adapters of its last or best epoch and of `earlier` ones; see `train_in_frame`.

    On a CPU, an interrupted training gives bit for bit the same result as without the interruption.
    """
    config = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    model = config["model"]
    frame = Frame(
        trainer="trl",
        recipe=recipe,
        state=Path(config["output_dir"]),
        base=Path(model["path"]),
        chat_template=config["tokenizer"].get("chat_template"),
        data_files=get_files(config, "dataset"),
        validation_files=get_files(config, "dataset_val"),
        epochs=config["trl"]["num_train_epochs"],
        batch_size=config["trl"]["per_device_train_batch_size"],
        device=model["device"],
        dtype=model["dtype"],
        packages=_PACKAGES,
        keeps_best_epoch="best_epoch" in config,
    )

    def run(start: Start) -> int | None:
        count = config.get("processes", 1)
        if model["device"] == "cuda" and count == 1:
            # With several GPUs in sight, transformers would copy the model to each of them.
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        from lorasweep.trainers import processes
        from lorasweep.trainers.trl import loop

        config["trl"]["per_device_train_batch_size"] //= 2**start.halvings
        config["trl"]["gradient_accumulation_steps"] *= 2**start.halvings
        arguments = (config, frame.log, frame.state.parents[1], metric_loggers, save_minutes)
        return processes.run_recipe(count, model["device"], loop.run, start, *arguments)

    train_in_frame(frame, adapter, earlier, run, lambda: _get_facts(config), until)


def _get_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says besides: the tokens that end an answer, the date of prompts, the quantization."""
    from lorasweep.trainers.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(**config["tokenizer"])
    end = tokenizer.plain_end if config["dataset"]["format"] == "completion" else tokenizer.end
    day, quantize = config["tokenizer"].get("template_date"), config["model"].get("quantize")
    return {
        "end_tokens": end.names,
        **({"template_date": day} if day else {}),
        **({"quantize": quantize} if quantize else {}),
    }
