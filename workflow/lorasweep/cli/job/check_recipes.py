"""Print what cannot be built of the parts that recipes name, as JSON: lists of a training, a part and the reason."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.trainers import get_trainer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipes", type=Path, required=True, help="JSON: texts of recipes by training")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="name of the trainer, or path of its module")


def run(arguments: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        # A trainer may do without.
        find_faults: Any = getattr(get_trainer(arguments.trainer), "find_faults", lambda recipe: {})
        recipes = json.loads(arguments.recipes.read_text(encoding="utf-8"))
        faults = [
            [training, part, reason]
            for training, recipe in recipes.items()
            for part, reason in find_faults(recipe).items()
        ]
    print(json.dumps(faults))
