"""Put a point's evaluation, which was made along with others, into its place; or say why there is none."""

import argparse
import sys
from pathlib import Path

from lorasweep.errors import InputError
from lorasweep.evaluation import EvaluationSpec
from lorasweep.evaluation_state import EvaluationState


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=EvaluationSpec.model_validate_json, required=True, help="EvaluationSpec as JSON")
    parser.add_argument("--point", type=Path, required=True, help="the point's folder of results")
    arguments = parser.parse_args()
    try:
        EvaluationState(arguments.spec, arguments.point).publish()
    except (InputError, OSError) as error:
        sys.exit(f"publish: {error}")


if __name__ == "__main__":
    main()
