"""Choose the epoch of a training whose adapter is kept, by the scores of all epochs' adapters on a task."""

import argparse
from pathlib import Path

from lorasweep.evaluation.epoch_choice import choose_epoch
from lorasweep.evaluation.placement import take_gpus
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import get_usage_file
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.usage import measure_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--training", type=Path, required=True, help="the training's folder")
    parser.add_argument("--epochs", type=int, required=True, help="the number of the training's epochs")
    parser.add_argument("--metric", help="metric that decides; by default the first that Inspect lists")
    parser.add_argument("--lower-is-better", action="store_true", help="the epoch with the lowest score is the best")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that hold the model")


def run(arguments: argparse.Namespace) -> None:
    end_on_sigterm()
    training, is_higher = arguments.training, not arguments.lower_is_better
    usage = get_usage_file(training.absolute().parent.parent, "choose_epoch", training.name)
    with measure_usage([usage], arguments.gpus):
        spec = take_gpus(arguments.spec, arguments.gpus)
        epoch = choose_epoch(spec, training, arguments.epochs, arguments.metric, higher_is_better=is_higher)
    print(f"{training.name}: epoch {epoch} of {arguments.epochs} is the best")
