"""What the experiment file says of evaluations is what Inspect does, in every mode; a finished sweep trains nothing."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sweep import POINTS, Sweep, run_stage

SOLVERS = """
from inspect_ai.solver import solver


@solver
def ask(before: str):
    async def solve(state, generate):
        state.user_prompt.text = before + state.user_prompt.text
        return await generate(state)
    return solve
"""

TASKS = [
    {"task": "tasks.py@letters", "name": "greedy", "limit": 2, "epochs": 2, "system_prompt": ""},
    {
        "task": "tasks.py@letters",
        "name": "sampled",
        "limit": 2,
        "epochs": 4,
        "max_tokens": 5,
        "temperature": 2.0,
        "solver": "solvers.py@ask",
        "solver_args": {"before": "Say: "},
        "scorer": "includes",
        "scorer_args": {"ignore_case": False},
    },
    {"task": "tasks.py@letters", "name": "after", "limit": 2, "temperature": 0},
]


@pytest.fixture(scope="module")
def evaluated(finished: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The finished sweep, evaluated anew on tasks with options of their own."""
    sweep = finished.copy(tmp_path_factory.mktemp("language"))
    (sweep.directory / "solvers.py").write_text(SOLVERS)
    sweep.edit(evaluation={"tasks": TASKS}, plan={"count": False})
    plan = sweep.plan()
    assert "train" not in plan
    assert "merge" not in plan
    assert plan["cleanup"] == 4
    sweep.run()
    assert sweep.plan() == {}
    return sweep


@pytest.fixture(scope="module")
def logs(evaluated: Sweep) -> dict[tuple[str, str], dict[str, Any]]:
    files = {
        (point, task["name"]): evaluated.results / point / f"eval/{task['name']}.eval"
        for point in (*POINTS.values(), "baseline")
        for task in TASKS
    }
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *files.values()))
    return {key: read[str(file)] for key, file in files.items()}


@pytest.mark.parametrize("point", [*POINTS.values(), "baseline"])
class TestOptionsOfATask:
    def test_each_sample_is_answered_so_many_times(self, logs: dict[Any, Any], point: str) -> None:
        assert set(logs[point, "greedy"]["by_epoch"]) == {"1/1", "1/2", "2/1", "2/2"}
        assert len(logs[point, "sampled"]["by_epoch"]) == 8
        assert len(logs[point, "after"]["by_epoch"]) == 2

    def test_a_temperature_makes_that_task_sample_and_no_other(self, logs: dict[Any, Any], point: str) -> None:
        greedy, after = logs[point, "greedy"]["by_epoch"], logs[point, "after"]["by_epoch"]
        for sample in ("1", "2"):
            answers = [logs[point, "sampled"]["by_epoch"][f"{sample}/{epoch}"] for epoch in range(1, 5)]
            assert len(set(answers)) > 1
            assert greedy[f"{sample}/1"] == greedy[f"{sample}/2"] == after[f"{sample}/1"]

    def test_answers_are_as_long_as_the_task_lets_them(self, logs: dict[Any, Any], point: str) -> None:
        assert logs[point, "sampled"]["answer_tokens"] == 5 < logs[point, "greedy"]["answer_tokens"]

    def test_its_solver_and_scorer_stand_in_for_the_tasks(self, logs: dict[Any, Any], point: str) -> None:
        assert logs[point, "sampled"]["prompt"] == [["user", "Say: after a"]]
        assert logs[point, "greedy"]["prompt"] == [["user", "after a"]]
        assert logs[point, "sampled"]["scorers"] == [["includes", {"ignore_case": False}]]
        assert logs[point, "greedy"]["scorers"][0][0] == "match"


def test_the_table_has_each_tasks_own_score(evaluated: Sweep) -> None:
    table = pd.read_csv(evaluated.results / "results.csv").set_index(["point", "task"])
    for point in (*POINTS.values(), "baseline"):
        assert table.loc[(point, "sampled"), "samples"] == 8
        assert pd.notna(table.loc[(point, "sampled"), "includes/accuracy"])
        assert pd.isna(table.loc[(point, "sampled"), "match/accuracy"])


def test_another_solver_evaluates_anew(evaluated: Sweep, tmp_path: Path) -> None:
    sweep = evaluated.copy(tmp_path)
    with (sweep.directory / "solvers.py").open("a") as file:
        file.write("# another\n")
    plan = sweep.plan()
    assert plan["evaluate"] == 2
    assert "train" not in plan
