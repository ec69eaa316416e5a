"""Train an adapter from a recipe, or a part of its epochs, and publish it."""

import argparse
from pathlib import Path

from lorasweep.experiment.sections import DEFAULT_TRAINER
from lorasweep.layout import (
    PRUNE,
    get_decision_file,
    get_epoch_folder,
    get_part_file,
    get_part_name,
    get_rung_folder,
    get_usage_file,
)
from lorasweep.trainers import SAVE_MINUTES, Diverged, Stopped, Trainer, get_trainer
from lorasweep.trainers.rungs import (
    describe_part,
    drop_rungs,
    explain_divergence,
    find_stop,
    has_diverged,
    note_divergence,
    publish_stopped,
)
from lorasweep.util.errors import JobError
from lorasweep.util.files import find_record, write_record
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
    parser.add_argument(
        "--rungs",
        type=lambda text: [int(epoch) for epoch in text.split(",")],
        default=[],
        help="epochs after which it was decided whether the training goes on, joined by commas",
    )
    parser.add_argument("--last-epoch", type=int, help="with --rungs: the number of the training's epochs")
    parser.add_argument("--until", type=int, help="epoch after which this part of the training ends, with a record")


def run(arguments: argparse.Namespace) -> None:
    # For the time before the trainer handles the signal itself to save its state, and after.
    end_on_sigterm(outlives_parent=True)
    trainer = get_trainer(arguments.trainer)
    try:
        if arguments.until:
            _train_part(trainer, arguments)
        else:
            _end_training(trainer, arguments)
    except Stopped as error:
        raise JobError("; ".join(filter(None, [str(error), requeue_if_preempted()]))) from error


def _train(trainer: Trainer, arguments: argparse.Namespace, adapter: Path, until: int | None = None) -> None:
    earlier = {
        int(epoch): adapter.with_name(get_epoch_folder(int(epoch)))
        for epoch in arguments.epochs.split(",")
        if epoch not in ("last", "best")
    }
    # A trainer that cannot pause need not know the word.
    pause = {} if until is None else {"until": until}
    loggers, minutes = arguments.metric_loggers.split(","), arguments.save_minutes
    training = _get_training(arguments).absolute()
    name = training.name
    job = ("train", name) if arguments.until is None else ("train_part", get_part_name(name, arguments.until))
    with measure_usage([get_usage_file(training.parent.parent, *job)], arguments.gpus):
        trainer.train(arguments.recipe, adapter, loggers, minutes, earlier, **pause)


def _train_part(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Train until the end of an epoch, and write the record from which it is decided whether the training goes on.

    A training that has diverged, or does not go on, says so in its record, and its part ends well.
    """
    training, results, until = _get_training(arguments), _get_results(arguments), arguments.until
    stopped, adapter = _find_stop(arguments), get_rung_folder(training, until)
    if stopped is not None:
        print(f"{training.name}: stopped after epoch {stopped}, as {results / PRUNE} says")
        record = {"after": until, "stopped": stopped}
    else:
        try:
            _train(trainer, arguments, adapter, until)
            record = describe_part(adapter, until)
        except Diverged as error:
            print(error)
            record = note_divergence(training, until, error)
    write_record(get_part_file(results, training.name, until), record)


def _end_training(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Train to the end; if it was decided that the training stops, publish its adapter as it was then."""
    training, results = _get_training(arguments), _get_results(arguments)
    stopped = _find_stop(arguments)
    if stopped is None:
        _train(trainer, arguments, arguments.adapter)
    else:
        _publish_stopped(trainer, arguments, stopped)
        print(f"{training.name}: stopped after epoch {stopped}, as {results / PRUNE} says")
    # Also if `prune` was taken out since.
    drop_rungs(training)


def _publish_stopped(trainer: Trainer, arguments: argparse.Namespace, stopped: int) -> None:
    """Publish the adapter of a training that stops after an epoch, as it was then.

    Raises:
        Diverged: it has none, as it diverged before. Its job has requested nothing to train it with.
    """
    training = _get_training(arguments)
    part = get_part_file(_get_results(arguments), training.name, stopped)
    if has_diverged(training, find_record(part)):
        raise Diverged(explain_divergence(training))
    end = (training, part, stopped, arguments.last_epoch)
    if not publish_stopped(*end):
        # The training left the experiment, and came back; or its adapter is damaged.
        drop_rungs(training)
        adapter = get_rung_folder(training, stopped)
        _train(trainer, arguments, adapter, stopped)
        write_record(part, describe_part(adapter, stopped))
        publish_stopped(*end)


def _find_stop(arguments: argparse.Namespace) -> int | None:
    decisions = [get_decision_file(_get_results(arguments), epoch) for epoch in arguments.rungs]
    return find_stop(decisions, _get_training(arguments).name)


def _get_training(arguments: argparse.Namespace) -> Path:
    """Return the training's folder."""
    folder: Path = arguments.recipe.parent
    return folder


def _get_results(arguments: argparse.Namespace) -> Path:
    """Return the experiment's folder."""
    return _get_training(arguments).parents[1]
