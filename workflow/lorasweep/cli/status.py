"""Show how far an experiment's run is. In a terminal the view stays until the run ends."""

import argparse

from rich.console import Console

from lorasweep.cli.experiments import add_results, find_results
from lorasweep.running.status_view import watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_results(parser)


def run(arguments: argparse.Namespace) -> None:
    results = find_results(arguments.experiment)
    watch(results, Console(highlight=False))
