"""Evaluate the adapters of several points with Inspect on one base model, which is loaded once."""

import argparse
import json
from pathlib import Path

from lorasweep.evaluation.evaluate import evaluate_adapters
from lorasweep.evaluation.placement import take_gpus
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import get_usage_file
from lorasweep.util.process import end_on_sigterm
from lorasweep.util.usage import measure_usage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--points", type=Path, nargs="+", required=True, help="the points' folders of results")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that hold the model")
    parser.add_argument("--output", type=Path, required=True, help="file for the points that failed, as JSON")


def run(arguments: argparse.Namespace) -> None:
    end_on_sigterm()
    folders = [folder.absolute() for folder in arguments.points]
    # A batch exists in one run only: so the points have what is measured of it.
    usage = [get_usage_file(folder.parent, "evaluate_adapters", folder.name) for folder in folders]
    with measure_usage(usage, arguments.gpus):
        failures = evaluate_adapters(take_gpus(arguments.spec, arguments.gpus), arguments.points)
    arguments.output.write_text(json.dumps(failures, indent=1) + "\n", encoding="utf-8")
