"""A real run whose task asks a judge: the job loads it, its log names it, and another judge is another evaluation."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep import SUMMED_UP, Sweep

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import model_graded_qa


@task
def graded():
    scorer = model_graded_qa(template="{question} {answer} {criterion}", grade_pattern="(?s)^(.)")
    return Task([Sample(input=f"after {letter}", target=letter) for letter in "abc"], scorer=scorer)
"""


@pytest.mark.long  # tests/eval says so of roles
def test_a_model_on_disk_judges_and_another_judge_is_another_evaluation(
    make: Callable[..., Sweep], other_model: Path
) -> None:
    sweep = make("judged")
    shutil.copytree(other_model, sweep.directory / "judge")
    (sweep.directory / "graded.py").write_text(TASK)
    baselines = [{"name": "same", "model": "model"}]
    sweep.edit(
        variables={},
        data={"train": None},
        evaluation={
            "baseline": False,
            "baselines": baselines,
            "tasks": ["graded.py@graded"],
            "model_roles": {"grader": {"model": "hf/judge", "config": {"max_tokens": 4}}},
        },
    )
    sweep.run()
    metrics = json.loads((sweep.results / "same/eval/metrics.json").read_text())
    assert metrics["model_roles"] == {"grader": "hf/judge"}
    assert metrics["tasks"]["graded"]["samples"] == 3
    assert sweep.plan() == {}
    sweep.edit(evaluation={"allow_network": True})
    assert "evaluate" not in sweep.plan()
    for grader in ("hf/model", {"model": "hf/judge", "config": {"max_tokens": 5}}):
        sweep.edit(evaluation={"model_roles": {"grader": grader}})
        assert sweep.plan() == {"evaluate": 1, "cleanup": 1, **SUMMED_UP}
