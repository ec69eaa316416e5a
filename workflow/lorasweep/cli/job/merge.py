"""Merge a LoRA adapter into its base model."""

import argparse
from pathlib import Path

from lorasweep.util.formats import format_bytes
from lorasweep.util.process import end_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="Hugging Face checkpoint directory")
    parser.add_argument("--adapter", type=Path, required=True, help="PEFT adapter directory")
    parser.add_argument("--output", type=Path, required=True, help="directory to write the merged model to")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="precision of the result (default: that of the base)"
    )
    parser.add_argument("--threads", type=int, default=2, help="shards to write at once")
    parser.add_argument("--verify", action="store_true", help="read the result again, and recompute a part of it")
    parser.add_argument(
        "--temporary", action="store_true", help="link to unchanged shards of the base instead of copying"
    )


def run(arguments: argparse.Namespace) -> None:
    from lorasweep.adapters.merge import merge

    end_on_sigterm()
    record = merge(**vars(arguments))
    print(
        f"{arguments.output}: {record['merged_weights']} weights merged, {record['replaced_tensors']} replaced; "
        f"{format_bytes(record['bytes_written'])} written, {format_bytes(record['bytes_linked'])} linked; "
        + (f"{record['verified_tensors']} tensors verified; " if arguments.verify else "")
        + f"sha256 of the weights {record['weights_sha256']}"
    )
