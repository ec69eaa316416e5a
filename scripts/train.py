"""Run a recipe, and publish the adapter that it trains."""

import argparse
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.layout import get_checkpoint_name
from lorasweep.process import end_on_sigterm
from lorasweep.slurm import requeue_if_preempted
from lorasweep.trainers import DEFAULT_TRAINER, SAVE_MINUTES, Stopped, TrainingError, get_trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="the trainer's recipe")
    parser.add_argument("--adapter", type=Path, required=True, help="directory to publish the adapter to")
    parser.add_argument("--metric-loggers", default="disk", help="who is told each step, joined by commas")
    parser.add_argument("--save-minutes", type=float, default=SAVE_MINUTES, help="between one saved state and the next")
    parser.add_argument("--epochs", default="last", help="those whose adapters are published too, joined by commas")
    parser.add_argument("--trainer", default=DEFAULT_TRAINER, help="its name, or the path of its module")
    arguments = parser.parse_args()
    point = arguments.adapter.parent
    earlier = {
        int(epoch): point.with_name(get_checkpoint_name(point.name, int(epoch))) / arguments.adapter.name
        for epoch in arguments.epochs.split(",")
        if epoch != "last"
    }
    loggers, minutes = arguments.metric_loggers.split(","), arguments.save_minutes
    # Until there is a state to save, and after.
    end_on_sigterm(outlives_parent=True)
    try:
        get_trainer(arguments.trainer).train(arguments.recipe, arguments.adapter, loggers, minutes, earlier)
    except Stopped as error:
        sys.exit("; ".join(filter(None, [f"train: {error}", requeue_if_preempted()])))
    except (InputError, TrainingError, OSError) as error:
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    main()
