"""Make a specification of an evaluation: one task, greedy, on a CPU in fp32, and `changes` to that."""

from typing import Any

from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec


def make_spec(**changes: Any) -> EvaluationSpec:
    settings = {
        "mode": "B2",
        "base_model": "m",
        "base_fingerprint": "f",
        "dtype": "fp32",
        "device": "cpu",
        "system_prompt": None,
        "tasks": [TaskSpec(name="a", task="a.py", args={}, limit=None)],
        "max_connections": 4,
        "max_tokens": 4,
        "temperature": 0,
        "seed": 0,
        "files": {},
    }
    return EvaluationSpec.model_validate(settings | changes)
