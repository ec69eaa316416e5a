"""Put a point's evaluation, which was made along with others, into its place; or say why there is none."""

import argparse
from pathlib import Path

from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.state import EvaluationState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")


def run(arguments: argparse.Namespace) -> None:
    EvaluationState(arguments.spec, arguments.point).publish()
