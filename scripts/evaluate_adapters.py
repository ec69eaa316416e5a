"""Evaluate the adapters of several points, with Inspect, on one base model that is loaded once."""

import argparse
import json
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.evaluation import EvaluationSpec
from lorasweep.evaluator import evaluate_adapters
from lorasweep.process import end_on_sigterm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--points", type=Path, nargs="+", required=True, help="the points' folders of results")
    parser.add_argument("--output", type=Path, required=True, help="file for the points that failed, as JSON")
    arguments = parser.parse_args()
    end_on_sigterm()
    try:
        failures = evaluate_adapters(arguments.spec, arguments.points)
        arguments.output.write_text(json.dumps(failures, indent=1) + "\n", encoding="utf-8")
    except (InputError, OSError) as error:
        sys.exit(f"evaluate_adapters: {error}")


if __name__ == "__main__":
    main()
