"""Decide which trainings go on after an epoch, by their validation losses or by scores on a task."""

import argparse
from pathlib import Path

from lorasweep.layout import TRAININGS, get_rung_name, get_usage_file
from lorasweep.sweep.pruning import Contender, Race
from lorasweep.util.files import write_record
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.usage import measure_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, required=True, help="the experiment's folder of results")
    parser.add_argument("--after", type=int, required=True, help="the epoch")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that hold the model that is asked a task")


def run(arguments: argparse.Namespace) -> None:
    end_on_sigterm()
    race, after = Race.read(arguments.results), arguments.after
    if race.prune.task:
        with measure_usage([get_usage_file(race.results.absolute(), "prune", get_rung_name(after))], arguments.gpus):
            _score(race, after, arguments.gpus)
    decision = race.write_decision(after)
    for training, verdict in decision["trainings"].items():
        print(f"{training}: {'goes on' if verdict['stays'] else 'stops'}: {verdict['why']}")


def _score(race: Race, after: int, gpus: int) -> None:
    """Score the adapters that have no score yet: those of one base and specification on one loaded base."""
    # Only the environment of evaluations has Inspect.
    from lorasweep.evaluation.placement import take_gpus
    from lorasweep.evaluation.rung_scores import drop_states, score_rungs
    from lorasweep.evaluation.spec import EvaluationSpec

    task = race.prune.task
    assert task
    by_spec: dict[str, list[Contender]] = {}
    for contender in race.contenders:
        if race.read_number(contender, after) is None and race.find_adapter(contender, after):
            by_spec.setdefault(contender.spec, []).append(contender)
    for text, contenders in by_spec.items():
        spec = take_gpus(EvaluationSpec.model_validate_json(text), gpus)
        by_folder = {race.results / TRAININGS / each.training: each for each in contenders}
        adapters = {folder: race.find_adapter(each, after) for folder, each in by_folder.items()}
        found = {folder: adapter for folder, adapter in adapters.items() if adapter}
        for folder, score in score_rungs(spec, found, after, task.metric).items():
            write_record(race.get_score_file(by_folder[folder], after), score)
            drop_states(folder)
