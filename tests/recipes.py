"""Write samples, and the recipe of a training on them: one point of a sweep, on a CPU in fp32 unless told otherwise."""

import json
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls, Data, Model
from lorasweep.trainers import TrainingSpec, get_trainer

# Two batches of an epoch of two steps are left over: torchtune carries them into the next one.
CONTROLS = {"epochs": 2, "batch_size": 3, "gradient_accumulation_steps": 3, "lr": 4e-3, "lora_dropout": 0.1}


GIVEN_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}\n"
)
"""A chat template to be used in place of the model's own. It marks answers, for other programs."""


def count_tokens_as_given(file: Path) -> int:
    """Count the tokens of samples, as `GIVEN_TEMPLATE` writes them: a byte is a token, and so is the end."""
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return sum(len(f"<user>_\n<assistant>_\n{s['input']}{s['output']}") for s in samples)


def write_samples(file: Path, letters: str) -> Path:
    """Write a file of samples; they are of several lengths, so that batches are padded."""
    samples = [{"input": "after " + a * (1 + i % 4), "output": b} for i, (a, b) in enumerate(pairwise(letters))]
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return file


def write_long_answers(file: Path) -> Path:
    """Write a file of samples whose answers go on where those of `write_samples` end."""
    samples = [{"input": f"after {letter}", "output": "bdfhjl" * 2} for letter in "acef"]
    file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return file


def write_recipe(
    directory: Path,
    model: Path,
    point: str = "point",
    data: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
    trainer: str = "torchtune",
    quantize: str | None = None,
    keeps_best_epoch: bool = False,
    chat_template: str | None = None,
    **controls: Any,
) -> Path:
    """Write the recipe of a training of a sweep in a directory."""
    spec = TrainingSpec(
        checkpoint=read_checkpoint(model, chat_template),
        controls=Controls(**{**CONTROLS, **controls}),
        swept=(),
        model=Model(path=str(model), device=device, dtype=dtype, quantize=quantize),
        data=Data(**{"train": str(write_samples(directory / "train.jsonl", ascii_lowercase)), **(data or {})}),
        output_dir=str(directory / "sweep/trainings" / point),
        keeps_best_epoch=keeps_best_epoch,
    )
    file = directory / "sweep/trainings" / point / "recipe.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(get_trainer(trainer).recipe(spec))
    return file
