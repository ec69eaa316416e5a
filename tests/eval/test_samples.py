"""Scores and metrics of Inspect's logs reach the tables: in Inspect's order, and with the clusters of their samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.model import get_model

from evaluation_specs import make_spec
from lorasweep.evaluation.inspect_tasks import EvaluationError, run_task
from lorasweep.evaluation.spec import TaskSpec
from lorasweep.evaluation.state import EvaluationState
from lorasweep.results.manifest import clean_up
from lorasweep.results.samples import read_samples
from lorasweep.util.errors import InputError

FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, accuracy, mean, scorer, std, stderr
from inspect_ai.solver import solver


@solver
def nothing():
    async def solve(state, generate):
        return state

    return solve


@scorer(metrics={"style": [std(), mean()], "content": [mean(), accuracy(), stderr()]})
def parts():
    async def score(state, target):
        return Score(value={"style": 1.0, "content": 0.0})

    return score


@scorer(metrics={"*": [mean()]})
def others():
    async def score(state, target):
        return Score(value={"style": 0.5})

    return score


TEXT = "a long text " * 200


@task
def questions():
    asked = [(text, question) for text in "ab" for question in "?!"]
    samples = [Sample(f"{text} {question}", metadata={"text": TEXT + text, "level": 1}) for text, question in asked]
    return Task(samples, solver=nothing(), scorer=parts())


@task
def plain():
    return Task([Sample("c"), Sample("d")], solver=nothing(), scorer=parts())


@task
def twice():
    return Task([Sample("c")], solver=nothing(), scorer=[parts(), others()])


@scorer(metrics=[accuracy()])
def judge():
    async def score(state, target):
        return Score(value="C") if state.input_text == "c" else Score.unscored(reason="grader_failed")

    return score


@task
def judged():
    return Task([Sample("c"), Sample("d"), Sample("e")], solver=nothing(), scorer=judge(), epochs=2)


@task
def some():
    return Task([Sample("c", metadata={"text": "c"}), Sample("d")], solver=nothing(), scorer=parts())
"""


def evaluate(folder: Path, task: str) -> Path:
    """Evaluate a task with Inspect as the point `baseline`, without a model; return the log."""
    (folder / "tasks.py").write_text(FILE)
    asked = TaskSpec(name=task, task=f"{folder}/tasks.py@{task}", args={}, limit=None)
    spec = make_spec(backend="vllm", mode="base", tasks=[asked])
    point = folder / "baseline"
    state = EvaluationState(spec, point)
    state.begin({})
    log, metrics = run_task(spec, asked, get_model("mockllm/model"), state.get_log_dir(task), "baseline", {})
    state.finish({task: log}, {"tasks": {task: metrics}})
    state.publish()
    return point / "eval" / f"{task}.eval"


def test_metrics_stay_in_the_order_in_which_inspect_lists_them(tmp_path: Path) -> None:
    evaluate(tmp_path, "questions")
    settings: dict[str, Any] = {"mode": "base", "dtype": "fp32", "device": "cpu"}
    clean_up(tmp_path / "baseline", settings, ["questions"], tmp_path / "benchmarks")
    manifest = json.loads((tmp_path / "baseline/manifest.json").read_text())
    assert list(manifest["evaluation"]["tasks"]["questions"]["scores"]) == [
        *("style/std", "style/mean", "content/mean", "content/accuracy", "content/stderr")
    ]


def test_no_score_replaces_another_scorers_of_its_name(tmp_path: Path) -> None:
    for _ in range(2):  # not when the task's log is found finished, either
        with pytest.raises(EvaluationError, match="its scorers parts and others both give the score 'style'"):
            evaluate(tmp_path, "twice")


def test_an_answer_without_a_verdict_has_no_score_and_is_a_sample(tmp_path: Path) -> None:
    samples = read_samples([evaluate(tmp_path, "judged")])
    assert samples["value"].to_list() == [1.0, 1.0]
    metrics = json.loads((tmp_path / "baseline/eval/metrics.json").read_text())["tasks"]["judged"]
    assert (metrics["scores"], metrics["samples"]) == ({"judge/accuracy": 1.0}, 6)


def test_samples_of_one_text_are_a_cluster_whole_texts_being_compared(tmp_path: Path) -> None:
    samples = read_samples([evaluate(tmp_path, "questions"), evaluate(tmp_path, "plain")], "text")
    assert list(samples.groupby("task")["cluster"].nunique()) == [0, 2]
    assert samples[samples["task"] == "questions"].groupby("cluster")["sample"].nunique().tolist() == [2, 2]
    assert "cluster" not in read_samples([tmp_path / "baseline/eval/plain.eval"])


@pytest.mark.parametrize(
    ("task", "cluster", "said"),
    [
        (
            "questions",
            "txt",
            r"no sample has the key 'txt' in its metadata \(did you mean 'text'\?\)\. Expected: level, t",
        ),
        ("plain", "text", "no sample has the key 'text' in its metadata. Expected: null, as no sample has metadata"),
        ("some", "text", "only some samples of the task 'some' have the key 'text' in their metadata"),
    ],
)
def test_a_key_that_no_sample_has_or_some_lack_is_refused_with_the_keys_that_there_are(
    tmp_path: Path, task: str, cluster: str, said: str
) -> None:
    log = evaluate(tmp_path, task)
    with pytest.raises(InputError, match=f"report.cluster: {said}"):
        read_samples([log], cluster)
