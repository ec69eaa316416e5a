"""Evaluate one point with Inspect, on every task of the experiment."""

import argparse
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.evaluation import EvaluationSpec
from lorasweep.evaluator import EvaluationError, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the base model's probe logits")
    arguments = parser.parse_args()
    try:
        evaluate(arguments.spec, arguments.point, arguments.probes)
    except (InputError, EvaluationError) as error:
        sys.exit(f"evaluate: {error}")


if __name__ == "__main__":
    main()
