"""Hash the files of an experiment again, and list all differences from its manifests, its table and the experiment.

With a folder of results, or one of a published point, nothing is compared with an experiment's file.
"""

import argparse
import sys
from pathlib import Path

from lorasweep.cli.experiments import add_results, find_results
from lorasweep.experiment.loading import read_config
from lorasweep.results.verification import Mismatch, verify
from lorasweep.running.outdated import find_outdated
from lorasweep.sweep.sweep import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)


def run(arguments: argparse.Namespace) -> None:
    results = find_results(arguments.experiment)
    files, mismatches = verify(results)
    if arguments.experiment.is_file():
        sweep = Sweep.load(read_config(arguments.experiment), str(arguments.experiment))
        if sweep.missing_model:
            print(f"Not compared with the experiment: {sweep.missing_model}")
        outdated = [found for found in find_outdated(sweep) if found.reason]
        mismatches += [Mismatch(Path(found.file), found.reason) for found in outdated]
    for mismatch in mismatches:
        print(f"{mismatch.path}: {mismatch.what}")
    if mismatches or not files:
        sys.exit(f"{len(mismatches)} of {files} files and rows do not match" if files else "there is no manifest")
    print(f"{files} files match their manifests" + (" and the experiment" if arguments.experiment.is_file() else ""))
