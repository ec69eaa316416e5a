"""Download the models and data sets that an experiment names on the Hugging Face hub, and pin them to commits.

A run itself downloads nothing. It is refused until these files are present.
"""

import argparse

from lorasweep.cli.experiments import add_experiment
from lorasweep.experiment.loading import load_experiment, read_config
from lorasweep.hub import references as hub
from lorasweep.layout import REVISIONS
from lorasweep.sweep.sweep import RESULTS
from lorasweep.util.errors import naming_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser)
    parser.add_argument("--dry-run", action="store_true", help="list what would be downloaded, and download nothing")


def run(arguments: argparse.Namespace) -> None:
    source = str(arguments.experiment)
    experiment = load_experiment(read_config(arguments.experiment), source)
    references = hub.find_references(experiment)
    record = RESULTS / experiment.experiment.name / REVISIONS
    if not references:
        print(f"{source} names nothing on the hub.")
    elif arguments.dry_run:
        with naming_file(source):
            print(hub.describe_missing(references, record) or "Everything is downloaded.")
    else:
        with naming_file(source):
            hub.fetch(references, record)
        revisions = hub.read_revisions(record)
        print("Fetched:", *sorted({str(hub.pin(reference, revisions).path) for reference in references.values()}))
