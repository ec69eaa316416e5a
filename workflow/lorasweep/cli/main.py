"""The entry point of the command: it imports the module of a subcommand, which defines its arguments and its action."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from lorasweep.util.errors import call_to_the_end, telling_the_log

WORDS = {
    "new": "write an experiment's file from a model, a file of samples and a task",
    "plan": "show the jobs, disk space and time of a run, and compare the modes of keeping checkpoints",
    "status": "show the progress of a run",
    "show": "print the answer and the table of results",
    "compare": "compare finished experiments that have a task in common",
    "ledger": "print the disk space and time used, beside the planned values",
    "verify": "hash all files again, and list those that differ from their manifests",
    "download": "download what an experiment names on the Hugging Face hub",
    "merge": "merge an adapter into its base model",
    "publish": "put together what others need of a point, in a folder or on the Hugging Face hub",
    "job": "run the job of a rule (used by the workflow)",
}

JOBS = {
    "train": "train the adapter of a point, or a part of its epochs",
    "prune": "decide which trainings go on after an epoch",
    "choose_epoch": "choose a training's epoch by its score on a task",
    "take": "use a training's adapter as the adapter of a point",
    "adopt": "copy an existing adapter to a point",
    "merge": "merge an adapter into the base model",
    "evaluate": "evaluate a point or a baseline",
    "evaluate_adapters": "evaluate several points on one loaded base model",
    "publish": "move a point's result of a batch evaluation to its final place",
    "cleanup": "remove a point's temporary files and write its manifest",
    "read_samples": "collect the scores of all samples",
    "collect": "make the tables of results",
    "report": "make the report",
    "measure_lengths": "count the tokens of training samples",
    "measure_tasks": "load tasks, and count their samples",
    "describe_model": "build a model without its weights, and print its layers and parameters",
    "check_recipes": "build what recipes name, without the model's weights",
    "ask_hub": "look up a reference on the hub, download it, or upload a folder to it",
}


def main() -> None:
    """Run the subcommand that the command line names."""
    arguments = sys.argv[1:]
    commands, program, package = WORDS, "lorasweep", "lorasweep.cli"
    if arguments[:1] == ["job"]:
        commands, program, package = JOBS, "lorasweep job", "lorasweep.cli.job"
        arguments = arguments[1:]
    parser = argparse.ArgumentParser(prog=program, description="Sweeps of LoRA fine-tuning.", add_help=True)
    words = parser.add_subparsers(dest="word", required=True, metavar="WORD")
    for word, summary in commands.items():
        # Only the called subcommand's module is imported: requirements of the others may not be installed here.
        words.add_parser(word, help=summary, add_help=False)
    word = parser.parse_known_args(arguments[:1])[0].word
    call_to_the_end(
        lambda: _call(word, f"{program} {word}", package, arguments[1:]), f"{word}: " if commands is JOBS else ""
    )


def _call(word: str, program: str, package: str, arguments: list[str]) -> None:
    module = import_module(f"{package}.{word}")
    parser = argparse.ArgumentParser(
        prog=program, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments))


def run_here(job: str, log: str, *arguments: str | Sequence[str]) -> None:
    """Run the job of a rule in this process, as `lorasweep job JOB ARGUMENTS` runs it in one of its own.

    For jobs of milliseconds, of which a sweep has one or more a point: each start of Python would take longer.

    Raises:
        JobError: the job failed; the log says why.
    """
    flat = [part for argument in arguments for part in ([argument] if isinstance(argument, str) else argument)]
    with telling_the_log(Path(log), f"{job}: "):
        _call(job, f"lorasweep job {job}", "lorasweep.cli.job", list(map(str, flat)))
