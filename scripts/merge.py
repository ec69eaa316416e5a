"""Merge a LoRA adapter into its base model."""

import argparse
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.merge import merge
from lorasweep.process import end_on_sigterm
from lorasweep.tensors import PRECISIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT adapter directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the merged model to")
    parser.add_argument("--dtype", choices=PRECISIONS, help="precision of the merged model, if not the base's")
    parser.add_argument("--threads", type=int, default=2, help="shards to write at once")
    parser.add_argument("--verify", action="store_true", help="read the result again, and compute some of it anew")
    parser.add_argument("--temporary", action="store_true", help="link to shards of the base that do not change")
    arguments = parser.parse_args()
    end_on_sigterm()
    try:
        record = merge(**vars(arguments))
    except (InputError, OSError) as error:
        sys.exit(f"merge: {error}")
    print(
        f"{arguments.output}: {record['merged_weights']} weights merged, {record['replaced_tensors']} replaced; "
        f"{record['bytes_written'] / 1e9:.3g} GB written, {record['bytes_linked'] / 1e9:.3g} GB linked; "
        + (f"{record['verified_tensors']} tensors verified; " if arguments.verify else "")
        + f"sha256 of the weights {record['weights_sha256']}"
    )


if __name__ == "__main__":
    main()
