"""Move a point's result of a batch evaluation to the point's folder, or fail with the error of its evaluation."""

import argparse
from pathlib import Path

from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")


def run(arguments: argparse.Namespace) -> None:
    EvaluationState(arguments.spec, arguments.point).publish()
