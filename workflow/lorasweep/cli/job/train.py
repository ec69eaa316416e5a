"""Run a recipe, and publish the adapter that it trains."""

import argparse
from pathlib import Path

from lorasweep.layout import get_epoch_folder
from lorasweep.trainers import DEFAULT_TRAINER, SAVE_MINUTES, Stopped, get_trainer
from lorasweep.util.errors import JobError
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.slurm import requeue_if_preempted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", type=Path, required=True, help="the trainer's recipe")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to publish the adapter to")
    parser.add_argument("--metric-loggers", default="disk", help="who is told each step, joined by commas")
    parser.add_argument("--save-minutes", type=float, default=SAVE_MINUTES, help="between one saved state and the next")
    parser.add_argument("--epochs", default="last", help="those whose adapters are published too, joined by commas")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="its name, or the path of its module")


def run(arguments: argparse.Namespace) -> None:
    earlier = {
        int(epoch): arguments.adapter.with_name(get_epoch_folder(int(epoch)))
        for epoch in arguments.epochs.split(",")
        if epoch != "last"
    }
    loggers, minutes = arguments.metric_loggers.split(","), arguments.save_minutes
    # Until there is a state to save, and after.
    end_on_sigterm(outlives_parent=True)
    try:
        get_trainer(arguments.trainer).train(arguments.recipe, arguments.adapter, loggers, minutes, earlier)
    except Stopped as error:
        raise JobError("; ".join(filter(None, [str(error), requeue_if_preempted()]))) from error
