"""Hash the files of an experiment again, and list all differences from its manifests and its table."""

import argparse
import sys

from lorasweep.cli.experiments import add_results, find_results
from lorasweep.results.verification import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)


def run(arguments: argparse.Namespace) -> None:
    results = find_results(arguments.experiment)
    files, mismatches = verify(results)
    for mismatch in mismatches:
        print(f"{mismatch.path}: {mismatch.what}")
    if mismatches or not files:
        sys.exit(f"{len(mismatches)} of {files} files and rows do not match" if files else "there is no manifest")
    print(f"{files} files match their manifests")
