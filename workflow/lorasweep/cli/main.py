"""The entry of the command: it finds the module of a word, which says what the word does and takes."""

import argparse
import sys
from importlib import import_module

from lorasweep.util.errors import call_to_the_end

WORDS = {
    "plan": "say what a run would do and take, and what the other ways to keep checkpoints would",
    "status": "show how far a run is",
    "show": "print the answer and the table of results",
    "ledger": "print what was kept and spent, beside what was planned",
    "verify": "hash all files again, and name those that are not what their manifests say",
    "download": "fetch what an experiment names on the Hugging Face hub",
    "merge": "make one model of a base model and an adapter",
    "job": "do what a rule runs",
}

JOBS = {
    "train": "train the adapter of a point",
    "take": "take a training's adapter, as that of a point",
    "adopt": "take over an adapter that exists",
    "merge": "merge an adapter into the base model",
    "evaluate": "evaluate a point, or a model as it is",
    "evaluate_adapters": "evaluate several points on one loaded base model",
    "publish": "make what was evaluated of a point its own",
    "cleanup": "write the manifest of a point",
    "read_samples": "gather the scores of all samples",
    "collect": "make the tables of results",
    "report": "make the report",
    "measure_lengths": "count the tokens of training samples",
    "measure_tasks": "count the samples of tasks",
    "ask_hub": "look at something on the hub, or fetch it",
}


def main() -> None:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    known, program, package = WORDS, "lorasweep", "lorasweep.cli"
    if arguments[:1] == ["job"]:
        known, program, package = JOBS, "lorasweep job", "lorasweep.cli.job"
        arguments = arguments[1:]
    parser = argparse.ArgumentParser(prog=program, description="Sweeps of LoRA fine-tuning.", add_help=True)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for word, does in known.items():
        # Only the module of the word that is called is imported: what others need may not be installed here.
        words.add_parser(word, help=does, add_help=False)
    word = parser.parse_known_args(arguments[:1])[0].word
    module = import_module(f"{package}.{word}")
    parser = argparse.ArgumentParser(
        prog=f"{program} {word}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    given = parser.parse_args(arguments[1:])
    call_to_the_end(lambda: module.run(given), f"{word}: " if known is JOBS else "")
