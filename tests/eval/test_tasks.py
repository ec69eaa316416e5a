"""Tasks are loaded with what replaces their parts, and tell their metrics where those do not depend on the scores."""

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Epochs, Task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Metric, SampleScore, Scorer, accuracy, choice, grouped, match, mean, metric, scorer, std

from lorasweep.evaluation.inspect_tasks import find_shared_score, list_scores, load_parts, name_metrics
from lorasweep.evaluation.spec import TaskSpec

FILE = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match


@task
def letters(size: int = 2) -> Task:
    return Task(dataset=[Sample(input="a", target="b")] * size, scorer=match())
"""


@metric
def spread() -> Metric:
    def compute(scores: list[SampleScore]) -> Any:
        return {"low": 0.0, "high": 1.0}

    return compute


@scorer(metrics={"form": [mean()], "content": [mean(), std()]})
def parts() -> Scorer:
    async def score(state: Any, target: Any) -> Any:
        raise NotImplementedError

    return score


@scorer(metrics=[{"*": [mean()]}])
def anything() -> Scorer:
    async def score(state: Any, target: Any) -> Any:
        raise NotImplementedError

    return score


@scorer(metrics=[spread()])
def content() -> Scorer:
    async def score(state: Any, target: Any) -> Any:
        raise NotImplementedError

    return score


def make_task(**parts: Any) -> Task:
    return Task(dataset=[Sample(input="a", target="b")], **parts)


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        (make_task(scorer=match()), ["match/accuracy", "match/stderr"]),
        (make_task(scorer=[match(), match()]), ["match/accuracy", "match/stderr", "match1/accuracy", "match1/stderr"]),
        (make_task(scorer=choice(), metrics=[accuracy()]), ["choice/accuracy"]),
        (make_task(scorer=match(), epochs=Epochs(4, "mode")), ["match[mode]/accuracy", "match[mode]/stderr"]),
        (make_task(scorer=parts()), ["form/mean", "content/mean", "content/std"]),
        (make_task(scorer=anything()), None),
        (make_task(scorer=match(), metrics=[accuracy(), spread()]), None),
        (make_task(scorer=match(), metrics=[grouped(accuracy(), "kind")]), None),
        (make_task(), None),
    ],
    ids=["one", "two alike", "the task's", "a reducer", "keys", "any key", "an own one", "grouped", "none"],
)
def test_metrics_are_named_as_in_the_table_or_not_at_all(task: Task, metrics: list[str] | None) -> None:
    assert name_metrics(task) == metrics


@pytest.mark.parametrize(
    ("scorers", "shared"),
    [
        ([match(), match(), parts()], None),
        ([anything(), anything()], None),
        ([parts(), match(), parts()], "its scorers parts and parts1 both give the score 'form'"),
        ([content(), parts()], "its scorers content and parts both give the score 'content'"),
    ],
    ids=["none", "any key", "one twice", "a name and a key"],
)
def test_a_score_that_two_scorers_give_is_found_with_both(scorers: list[Scorer], shared: str | None) -> None:
    assert find_shared_score(list_scores(make_task(scorer=scorers))) == shared


def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> Any:
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text(FILE)
    return load_parts(TaskSpec(**{"name": "x", "task": "tasks.py@letters", "args": {}, "limit": None, **parts}))


def test_a_task_is_loaded_with_its_arguments_and_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tmp_path, monkeypatch, args={"size": 3}, scorer="includes", solver="chain_of_thought")
    assert len(loaded.dataset) == 3
    assert name_metrics(loaded) == ["includes/accuracy", "includes/stderr"]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"scorer": "match", "scorer_args": {"locaton": "end"}}, "locaton"),
        ({"solver": "chain_of_thought", "solver_args": {"tempate": "x"}}, "tempate"),
        ({"solver": "none"}, "none"),
        ({"args": {"siz": 3}}, "siz"),
    ],
)
def test_an_argument_that_nothing_takes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], said: str
) -> None:
    load(tmp_path, monkeypatch)  # registers the task, as a package does
    with pytest.raises((TypeError, ValueError), match=said):
        load(tmp_path, monkeypatch, task="letters", **parts)
