"""Print the token counts of all training and validation samples as JSON: with the trainer's own tokenizer and template.

A sample that cannot be tokenized is no failure of this command: the output then has the reason as `refused`.
"""

import argparse
import json
import sys
from pathlib import Path

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.trainers import get_trainer
from lorasweep.util.errors import InputError, JobError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="a recipe that uses the samples")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="name of the trainer, or path of its module")


def run(arguments: argparse.Namespace) -> None:
    try:
        measured = get_trainer(arguments.trainer).measure_lengths(arguments.recipe)
        json.dump({"parts": measured}, sys.stdout)
    except (InputError, JobError) as error:
        json.dump({"refused": str(error)}, sys.stdout)
