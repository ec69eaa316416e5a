"""Evaluate one point with Inspect, on every task of the experiment."""

import argparse
from pathlib import Path

from lorasweep.evaluation.evaluate import evaluate
from lorasweep.evaluation.placement import take_gpus
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import STATE, get_usage_file
from lorasweep.util.files import hold_alone
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.usage import measure_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--model", type=Path, help="the point's full model; without it, the base model is evaluated")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the base model's probe logits")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that hold the model")


def run(arguments: argparse.Namespace) -> None:
    end_on_sigterm()
    with hold_alone(arguments.point / STATE / "evaluate.lock", f"evaluating {arguments.point.name}"):
        usage = get_usage_file(arguments.point.absolute().parent, "evaluate", arguments.point.name)
        with measure_usage([usage], arguments.gpus):
            spec = take_gpus(arguments.spec, arguments.gpus)
            evaluate(spec, arguments.point, arguments.probes, arguments.model)
