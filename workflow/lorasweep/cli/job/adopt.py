"""Copy an existing adapter to a point, after a check that it changes the base model."""

import argparse
from pathlib import Path

from lorasweep.adapters.adopt import adopt_adapter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", type=Path, required=True, help="PEFT adapter directory")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to copy the adapter to")
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--chat-template", help="text of a chat template that replaces the base model's own")


def run(arguments: argparse.Namespace) -> None:
    adopt_adapter(**vars(arguments))
