"""What the experiment file says of evaluations is what is done, in every mode; and nothing is trained for it."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sweep import POINTS, SUMMED_UP, Sweep, run_stage

# tests/eval says so of tasks with options, in one mode.
pytestmark = pytest.mark.long

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
        "max_tokens": 3,
        "temperature": 20.0,
        "solver": "solvers.py@ask",
        "solver_args": {"before": "Say: "},
        "scorer": "includes",
        "scorer_args": {"ignore_case": False},
    },
    {"task": "tasks.py@letters", "name": "after", "limit": 2, "temperature": 0},
]


EVALUATED = (*POINTS.values(), "baseline", "checkpoint")


@pytest.fixture(scope="module")
def evaluated(finished: Sweep, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The finished sweep, evaluated anew on tasks with options of their own, beside a copy of one of its models."""
    sweep = finished.copy(tmp_path_factory.mktemp("language"))
    (sweep.directory / "solvers.py").write_text(SOLVERS)
    shutil.copytree(sweep.results / POINTS["A"] / "hf_model", sweep.directory / "checkpoint")
    baselines = [{"name": "checkpoint", "model": "checkpoint"}]
    sweep.edit(evaluation={"tasks": TASKS, "baselines": baselines}, plan={"count": False})
    evaluations = {"merge": 1, "evaluate": 4, "evaluate_adapters": 1, "publish": 1}
    assert sweep.plan() == {**evaluations, "cleanup": 5, **SUMMED_UP}
    sweep.run()
    assert sweep.plan() == {}
    return sweep


@pytest.fixture(scope="module")
def logs(evaluated: Sweep) -> dict[tuple[str, str], dict[str, Any]]:
    files = {
        (point, task["name"]): evaluated.results / point / f"eval/{task['name']}.eval"
        for point in EVALUATED
        for task in TASKS
    }
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *files.values()))
    return {key: read[str(file)] for key, file in files.items()}


@pytest.mark.parametrize("point", EVALUATED)
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
        assert logs[point, "sampled"]["answer_tokens"] == 3
        assert logs["baseline", "greedy"]["answer_tokens"] == 8

    def test_its_solver_and_scorer_stand_in_for_the_tasks(self, logs: dict[Any, Any], point: str) -> None:
        assert logs[point, "sampled"]["prompt"] == [["user", "Say: after a"]]
        assert logs[point, "greedy"]["prompt"] == [["user", "after a"]]
        assert logs[point, "sampled"]["scorers"] == [["includes", {"ignore_case": False}]]
        assert logs[point, "greedy"]["scorers"][0][0] == "match"


def test_the_table_has_each_tasks_own_score(evaluated: Sweep) -> None:
    table = pd.read_csv(evaluated.results / "results.csv").set_index(["point", "task"])
    for point in EVALUATED:
        assert table.loc[(point, "sampled"), "samples"] == 8
        assert pd.notna(table.loc[(point, "sampled"), "includes/accuracy"])
        assert pd.isna(table.loc[(point, "sampled"), "match/accuracy"])


def test_a_checkpoint_that_exists_is_evaluated_and_answers_as_where_it_is_from(
    evaluated: Sweep, logs: dict[Any, Any]
) -> None:
    assert logs["checkpoint", "greedy"]["by_epoch"] == logs[POINTS["A"], "greedy"]["by_epoch"]
    assert logs["checkpoint", "greedy"]["by_epoch"] != logs["baseline", "greedy"]["by_epoch"]
    table = pd.read_csv(evaluated.results / "results.csv")
    rows = table[table["point"] == "checkpoint"]
    assert set(rows["mode"]) == {"base"}
    assert rows["adapter_sha256"].isna().all()
    others = table[table["point"] == "baseline"]
    assert set(rows["base_model_fingerprint"]).isdisjoint(others["base_model_fingerprint"])
    assert {file.name for file in (evaluated.results / "checkpoint").iterdir()} == {"eval", "manifest.json"}
    with (evaluated.results / "ledger.csv").open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if row["point"] == "checkpoint")
    assert (row["mode"], row["is_done"]) == ("base", "True")
    evaluated.call("verify")


def test_another_solver_evaluates_anew(evaluated: Sweep, tmp_path: Path) -> None:
    sweep = evaluated.copy(tmp_path)
    with (sweep.directory / "solvers.py").open("a") as file:
        file.write("# another\n")
    plan = sweep.plan()
    assert plan["evaluate"] == 4
    assert "train" not in plan
