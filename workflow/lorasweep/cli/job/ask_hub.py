"""Look up a reference on the Hugging Face hub, or download it. The last line of output is the result as JSON."""

import argparse
import contextlib
import json
import sys

from lorasweep.hub.download import fetch, look
from lorasweep.hub.references import read_reference
from lorasweep.util.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("look", "fetch"))
    parser.add_argument("reference", type=read_reference, help="hf://org/name@revision, or a data set's file")


def run(arguments: argparse.Namespace) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = look(arguments.reference) if arguments.what == "look" else {}
            if arguments.what == "fetch":
                fetch(arguments.reference)
        print(json.dumps(result))
    except (InputError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)
