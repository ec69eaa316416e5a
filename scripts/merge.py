"""Merge a LoRA adapter into its base model."""

import argparse
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.merge import merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT adapter directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the merged model to")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), required=True, help="precision of the merged model")
    arguments = parser.parse_args()
    try:
        merge(arguments.base, arguments.adapter, arguments.output, arguments.dtype)
    except (InputError, OSError) as error:
        sys.exit(f"merge: {error}")


if __name__ == "__main__":
    main()
