"""Look at what a reference stands for on the Hugging Face hub, or fetch it; the last line says so as JSON."""

import argparse
import contextlib
import json
import sys

from lorasweep.download import fetch, look
from lorasweep.errors import InputError
from lorasweep.hub import read_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("look", "fetch"))
    parser.add_argument("reference", type=read_reference, help="hf://org/name@revision, or a data set's file")
    arguments = parser.parse_args()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            said = look(arguments.reference) if arguments.what == "look" else fetch(arguments.reference)
        print(json.dumps(said or {}))
    except (InputError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)


if __name__ == "__main__":
    main()
