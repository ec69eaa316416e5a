"""Print the layers and parameters of a model by its `config.json`, as JSON; null if transformers does not know it."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from lorasweep.adapters.meta_model import describe_model
from lorasweep.checkpoints.json_files import read_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory; weights are not needed")


def run(arguments: argparse.Namespace) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        config = read_json(arguments.model / "config.json")
        described = describe_model(arguments.model, config.get("model_type"))
    print(json.dumps(described))
