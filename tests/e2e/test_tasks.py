"""Tasks by point, and a task with a prefix of its own, in every mode: what is run, what is shown, what runs again."""

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest

from sweep import RUN, SUMMED_UP, Sweep, run_stage

PREFIX = "It is:"
SOME = {"task": "tasks.py@letters", "name": "some", "limit": 3, "assistant_prefix": PREFIX}
RANK_4 = [f"lora_rank=4__mode={mode}" for mode in ("A", "B1", "B2")]


@pytest.mark.long
def test_points_are_evaluated_on_their_own_tasks(make: Callable[..., Sweep]) -> None:
    runs = [{"name": "control", "lora_rank": 2, "seed": 1, "tasks": ["all"]}, {"name": "kept", "seed": 2, "tasks": []}]
    sweep = make("tasks", variables={"lora_rank": [2, 4], "mode": ["A", "B1", "B2"]}, runs=runs)
    every: dict[str, Any] = {"task": "tasks.py@letters", "name": "all", "limit": 2}
    tasks = [{**SOME, "when": "lora_rank == 4"}, every]
    sweep.edit(evaluation={"tasks": tasks, "max_tokens": 4}, controls={"epochs": 2})
    sweep.run()
    assert sweep.plan() == {}
    sweep.call("verify")

    table = pd.read_csv(sweep.results / "results.csv")
    rows = table.groupby("point")["task"].agg(lambda tasks: sorted(tasks.dropna())).to_dict()
    one, both = ["all"], ["all", "some"]
    assert rows == {
        "baseline": both,
        "control": one,
        "kept": [],
        **{f"lora_rank=2__mode={mode}": one for mode in ("A", "B1", "B2")},
        **dict.fromkeys(RANK_4, both),
    }
    for point, names in rows.items():
        assert sorted(file.stem for file in (sweep.results / point).glob("eval/*.eval")) == names
    some = table[(table["task"] == "some") & (table["mode"] != "base")]
    assert some["match/accuracy:delta"].notna().all()
    answer = json.loads((sweep.results / "answer.json").read_text())
    assert answer["task"] == "some"
    assert answer["caveats"][0].endswith(" settings were not evaluated on some, and not compared.")

    logs = [sweep.results / point / "eval/some.eval" for point in RANK_4]
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *logs))
    answers = [read[str(log)]["completions"] for log in logs]
    assert answers[0] == answers[1] == answers[2]
    assert not any(text.startswith(PREFIX) for text in answers[0].values())
    for point in RANK_4:
        page = sweep.results / point / "eval/reproduce.py"
        said = run_page(sweep, str(page.relative_to(sweep.directory)))
        assert said.endswith("The scores are those recorded.\n")

    more = {**every, "name": "more", "limit": 1, "when": "lora_rank == 2 and seed == 0 and mode == 'B2'"}
    sweep.edit(evaluation={"tasks": [*tasks, more]})
    assert sweep.plan() == {"evaluate": 1, "evaluate_adapters": 1, "publish": 1, "cleanup": 2, **SUMMED_UP}
    before = {point: (sweep.results / point / "manifest.json").stat().st_mtime_ns for point in rows}
    sweep.run()
    changed = {p for p in rows if (sweep.results / p / "manifest.json").stat().st_mtime_ns != before[p]}
    assert changed == {"baseline", "lora_rank=2__mode=B2"}
    assert sweep.plan() == {}


def run_page(sweep: Sweep, page: str) -> str:
    done = subprocess.run([RUN, "eval", page], cwd=sweep.directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
