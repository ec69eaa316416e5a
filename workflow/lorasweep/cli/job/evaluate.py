"""Evaluate one point with Inspect, on every task of the experiment."""

import argparse
import tempfile
from pathlib import Path

from lorasweep.adapters.merge import merge
from lorasweep.evaluation.evaluate import evaluate
from lorasweep.evaluation.placement import take_gpus
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.layout import STATE
from lorasweep.util.files import hold_alone
from lorasweep.util.process import end_on_sigterm


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the base model's probe logits")
    parser.add_argument("--merge-in", type=Path, help="folder for the merged model, which is removed at the end")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that hold the model")
    parser.add_argument("--threads", type=int, default=2, help="shards of the merged model to write at once")


def run(arguments: argparse.Namespace) -> None:
    end_on_sigterm()
    with hold_alone(arguments.point / STATE / "evaluate.lock", f"evaluating {arguments.point.name}"):
        spec = take_gpus(arguments.spec, arguments.gpus)
        if arguments.merge_in:
            evaluate_merged(spec, arguments.point, arguments.probes, arguments.merge_in, arguments.threads)
        else:
            evaluate(spec, arguments.point, arguments.probes)


def evaluate_merged(spec: EvaluationSpec, point: Path, probes: Path, merge_in: Path, threads: int) -> None:
    """Merge a point's adapter into a temporary model below `merge_in`, and evaluate that model."""
    merge_in.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorasweep-", dir=merge_in) as folder:
        merged = Path(folder, "model")
        merge(Path(spec.base_model), point / "adapter", merged, spec.dtype, temporary=True, threads=threads)
        evaluate(spec, point, probes, merged)
