"""A task of which samples failed goes on in the next attempt, whatever it says of errors, and wherever the model is."""

from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import get_model

from evaluation_specs import make_spec
from lorasweep.evaluation.inspect_tasks import EvaluationError, run_task
from lorasweep.evaluation.spec import TaskSpec

TASK = """
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, accuracy, scorer
from inspect_ai.solver import solver

HERE = Path(__file__).parent


@solver
def ask_a_server():
    async def solve(state, generate):
        with (HERE / "asked").open("a") as asked:
            asked.write(state.input_text)
        if state.input_text == "c" and (HERE / "outage").exists():
            raise RuntimeError("the server is down")
        return state

    return solve


@scorer(metrics=[accuracy()])
def passes():
    async def score(state, target):
        return Score(value="C")

    return score


@task
def letters(fail_on_error=None):
    return Task([Sample(x) for x in "abc"], solver=ask_a_server(), scorer=passes(), fail_on_error=fail_on_error)
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "outage").touch()
    (tmp_path / "tasks.py").write_text(TASK)
    return tmp_path / "tasks.py"


def run(task: Path, allowed: Any = None, place: str = "here") -> dict[str, Any]:
    args = {} if allowed is None else {"fail_on_error": allowed}
    asked = TaskSpec(name="letters", task=f"{task}@letters", args=args, limit=None)
    model = get_model("mockllm/model", memoize=False, model_path=place)
    # One at a time, as a failure ends those that are asked beside it.
    spec = make_spec(backend="vllm", tasks=[asked], max_connections=1)
    model.config = spec.make_generate_config(temperature=0)
    return run_task(spec, asked, model, task.parent / "logs", "point", {})[1]


@pytest.mark.parametrize("allowed", [None, False, 0.5], ids=["nothing said", "any error", "some errors"])
def test_samples_that_failed_are_run_again_and_no_others(task: Path, allowed: Any) -> None:
    with pytest.raises(EvaluationError, match="the server is down"):
        run(task, allowed)
    (task.parent / "outage").unlink()
    result = run(task, allowed)
    assert result["samples"] == 3
    assert result["scores"] == {"passes/accuracy": 1.0}
    assert (task.parent / "asked").read_text() == "abcc"


def test_a_task_that_was_begun_on_a_model_elsewhere_begins_again(task: Path) -> None:
    with pytest.raises(EvaluationError, match="the server is down"):
        run(task)
    (task.parent / "outage").unlink()
    assert run(task, place="elsewhere")["samples"] == 3
    assert (task.parent / "asked").read_text() == "abcabc"
