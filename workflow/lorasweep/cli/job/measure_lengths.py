"""Print the token counts of training samples as JSON, with the trainer's own tokenizer, template and columns."""

import argparse
import json
import sys
from pathlib import Path

from lorasweep.trainers import DEFAULT_TRAINER, get_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="a recipe that uses the samples")
    parser.add_argument("--most", type=int, default=1000, help="maximum number of samples to read, evenly spaced")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="name of the trainer, or path of its module")


def run(arguments: argparse.Namespace) -> None:
    json.dump(get_trainer(arguments.trainer).measure_lengths(arguments.recipe, arguments.most), sys.stdout)
