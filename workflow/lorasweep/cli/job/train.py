"""Train an adapter from a recipe, and publish it."""

import argparse
from pathlib import Path

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.layout import get_epoch_folder, get_usage_file
from lorasweep.trainers import SAVE_MINUTES, Stopped, get_trainer
from lorasweep.util.errors import JobError
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.slurm import requeue_if_preempted
from lorasweep.util.usage import measure_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="the trainer's recipe")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to publish the adapter to")
    parser.add_argument("--metric-loggers", default="disk", help="names of metric loggers, joined by commas")
    parser.add_argument("--save-minutes", type=float, default=SAVE_MINUTES, help="minutes between saved states")
    parser.add_argument(
        "--epochs",
        default="last",
        help="epochs whose adapters are published, joined by commas: numbers, and last or, as the recipe says, best",
    )
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the training uses, to measure how busy they are")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="name of the trainer, or path of its module")


def run(arguments: argparse.Namespace) -> None:
    earlier = {
        int(epoch): arguments.adapter.with_name(get_epoch_folder(int(epoch)))
        for epoch in arguments.epochs.split(",")
        if epoch not in ("last", "best")
    }
    loggers, minutes = arguments.metric_loggers.split(","), arguments.save_minutes
    training = arguments.adapter.absolute().parent
    usage = get_usage_file(training.parent.parent, "train", training.name)
    # For the time before the trainer handles the signal itself to save its state, and after.
    end_on_sigterm(outlives_parent=True)
    try:
        with measure_usage([usage], arguments.gpus):
            get_trainer(arguments.trainer).train(arguments.recipe, arguments.adapter, loggers, minutes, earlier)
    except Stopped as error:
        raise JobError("; ".join(filter(None, [str(error), requeue_if_preempted()]))) from error
