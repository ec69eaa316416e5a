"""Take over an adapter that exists: check that it changes the base model, and copy it to its point."""

import argparse
import sys
from pathlib import Path

from lorasweep.adapter import adopt_adapter
from lorasweep.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="PEFT adapter directory")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to copy it to")
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face checkpoint directory")
    arguments = parser.parse_args()
    try:
        adopt_adapter(**vars(arguments))
    except (InputError, OSError) as error:
        sys.exit(f"adopt: {error}")


if __name__ == "__main__":
    main()
