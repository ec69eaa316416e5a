"""Evaluate one point with Inspect, on every task of the experiment."""

import argparse
import sys
import tempfile
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.evaluation import EvaluationSpec
from lorasweep.evaluator import EvaluationError, evaluate
from lorasweep.files import hold_alone
from lorasweep.layout import STATE
from lorasweep.merge import merge
from lorasweep.process import end_on_sigterm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    parser.add_argument("--probes", type=Path, required=True, help="folder that keeps the base model's probe logits")
    parser.add_argument("--merge-in", type=Path, help="folder to make the merged model in, which goes when this ends")
    parser.add_argument("--threads", type=int, default=2, help="shards of the merged model to write at once")
    arguments = parser.parse_args()
    end_on_sigterm()
    try:
        with hold_alone(arguments.point / STATE / "evaluate.lock", f"evaluating {arguments.point.name}"):
            if arguments.merge_in:
                evaluate_merged(
                    arguments.spec, arguments.point, arguments.probes, arguments.merge_in, arguments.threads
                )
            else:
                evaluate(arguments.spec, arguments.point, arguments.probes)
    except (InputError, EvaluationError, OSError) as error:
        sys.exit(f"evaluate: {error}")


def evaluate_merged(spec: EvaluationSpec, point: Path, probes: Path, merge_in: Path, threads: int) -> None:
    merge_in.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lorasweep-", dir=merge_in) as folder:
        merged = Path(folder, "model")
        merge(Path(spec.base_model), point / "adapter", merged, spec.dtype, temporary=True, threads=threads)
        evaluate(spec, point, probes, merged)


if __name__ == "__main__":
    main()
