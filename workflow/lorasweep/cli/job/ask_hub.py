"""Look up a reference on the Hugging Face hub, download it, or upload a folder to it.

The last line of output is the result as JSON.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from lorasweep.hub.download import fetch, look
from lorasweep.hub.references import read_reference
from lorasweep.hub.upload import upload
from lorasweep.util.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("look", "fetch", "upload"))
    parser.add_argument("reference", type=read_reference, help="hf://org/name@revision, or a data set's file")
    parser.add_argument("--folder", type=Path, help="the folder to upload")
    parser.add_argument("--private", action="store_true", help="upload to a repository that only its owners see")


def run(arguments: argparse.Namespace) -> None:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = look(arguments.reference) if arguments.what == "look" else {}
            if arguments.what == "fetch":
                fetch(arguments.reference)
            elif arguments.what == "upload":
                result = {"commit": upload(arguments.reference, arguments.folder, is_private=arguments.private)}
        print(json.dumps(result))
    except (InputError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(1)
