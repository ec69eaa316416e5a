"""What can be known before the first job is said before it: tasks that do not load, metrics, and recipes' parts."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from sweep import ROOT, Sweep

BAD_TASKS = """
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.scorer import match, mean, scorer


@scorer(metrics={"quality": [mean()]})
def rubric():
    async def score(state, target):
        raise NotImplementedError

    return score


@scorer(metrics={"quality": [mean()]})
def other_rubric():
    async def score(state, target):
        raise NotImplementedError

    return score


@task
def twice() -> Task:
    return Task(dataset=[Sample(input="a")], scorer=[rubric(), other_rubric()])


@task
def reads() -> Task:
    return Task(dataset=json_dataset("none.jsonl"), scorer=match())


@task
def lacks() -> Task:
    try:
        import no_such_package
    except ImportError as error:
        raise ValueError("the data need a package:\\n  pip install no_such_package") from error


@task
def empty() -> Task:
    return Task(dataset=[])


@task
def asks_for_models() -> Task:
    from inspect_ai.model import get_model

    get_model(), get_model(role="grader", required=True)
    Path("loaded").open("a").write("once\\n")
    return Task(dataset=[Sample(input="a", target="b")], scorer=match())
"""

LETTERS = "tasks.py@letters"


@pytest.fixture
def baseline(make: Callable[..., Sweep]) -> Sweep:
    """A sweep that evaluates the base model alone."""
    sweep = make(variables={}, plan={})
    (sweep.directory / "bad.py").write_text(BAD_TASKS)
    models = {"baseline": False, "baselines": [{"name": "base", "model": "model"}]}
    sweep.edit(data={"train": None}, evaluation={**models, "model_roles": {"grader": "mockllm/model"}})
    return sweep


def refuse(sweep: Sweep, *arguments: str) -> str:
    """Run a sweep that is refused before its first job, and return what it said."""
    refused = sweep.snakemake(*arguments)
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert not list(sweep.results.glob("*/*/*")), said
    assert "Traceback" not in said, said
    return said


def test_tasks_that_do_not_load_are_told_before_the_first_job_by_their_keys(baseline: Sweep) -> None:
    tasks = [
        LETTERS,
        "bad.py@reads",
        "bad.py@lacks",
        "bad.py@empty",
        {"task": LETTERS, "name": "solved", "solver": "system_message", "solver_args": {"tempate": "x"}},
        {"task": LETTERS, "name": "scored", "scorer": "match", "scorer_args": {"locaton": "end"}},
        "bad.py@asks_for_models",
    ]
    baseline.edit(evaluation={"tasks": tasks})
    said = refuse(baseline)
    assert "evaluation.tasks.0" not in said
    assert (
        f"{baseline.directory}/sweep.yaml: evaluation.tasks.1: 'bad.py@reads' does not load: [Errno 2] No such file"
        in said
    )
    assert "none.jsonl" in said
    assert (
        "evaluation.tasks.2: 'bad.py@lacks' does not load: ValueError: the data need a package:\n"
        "  pip install no_such_package\ncaused by ModuleNotFoundError: No module named 'no_such_package'" in said
    )
    assert "evaluation.tasks.3: 'bad.py@empty' does not load: ValueError: The specified dataset is empty" in said
    unloaded = "'tasks.py@letters' does not load: TypeError: "
    assert f"evaluation.tasks.4: {unloaded}system_message() missing 1 required positional argument: 'temp" in said
    assert f"evaluation.tasks.5: {unloaded}match() got an unexpected keyword argument 'locaton'" in said
    assert "evaluation.tasks.6" not in said
    # A dry run tells what is on record, and loads nothing.
    loaded = baseline.directory / "loaded"
    assert loaded.read_text() == "once\n"
    assert "A run would be refused: " in (dry := baseline.run("--dry-run"))
    assert "evaluation.tasks.3: 'bad.py@empty' does not load: ValueError: The specified dataset is empty" in dry
    assert loaded.read_text() == "once\n"
    # What loads is not loaded again, until the task is another.
    baseline.edit(evaluation={"tasks": ["bad.py@asks_for_models"]})
    assert "would be refused" not in baseline.call("plan", "--cores", "2")
    assert "would be refused" not in baseline.call("plan", "--cores", "2")
    assert loaded.read_text() == "once\n" * 2


def test_a_metric_that_no_scorer_has_and_a_score_that_two_have_are_told_before_the_first_job(baseline: Sweep) -> None:
    baseline.edit(report={"metric": "match/acuracy"}, evaluation={"tasks": [LETTERS, "bad.py@twice"]})
    expected = "sweep.yaml: report.metric: 'match/acuracy' is no metric of the task 'letters' (did you mean 'match/acc"
    assert expected in (said := refuse(baseline))
    assert "Expected: match/accuracy, match/stderr" in said
    assert "evaluation.tasks.1: 'twice': its scorers rubric and other_rubric both give the score 'quality'" in said
    assert expected in baseline.run("--dry-run")
    baseline.edit(report={"metric": "match/accuracy"}, evaluation={"tasks": [LETTERS]})
    assert "would be refused" not in baseline.run("--dry-run")


def test_a_key_of_clusters_that_no_task_has_is_told_before_the_first_job(baseline: Sweep) -> None:
    (baseline.directory / "texts.py").write_text(
        "from inspect_ai import Task, task\nfrom inspect_ai.dataset import Sample\n"
        "from inspect_ai.scorer import match\n@task\ndef texts():\n"
        "    samples = [Sample('a', target='b', metadata={'text': t, **({'rare': 1} if t else {})}) for t in (0, 1)]\n"
        "    return Task(samples, scorer=match())\n"
    )
    baseline.edit(evaluation={"tasks": ["tasks.py@letters", "texts.py@texts"]}, report={"cluster": "txt"})
    expected = (
        "sweep.yaml: report.cluster: 'txt' is no key that all samples of a task have in their metadata (did you me"
    )
    assert expected in (said := refuse(baseline))
    assert "Expected: text\n" in f"{said}\n"
    assert expected in baseline.run("--dry-run")
    baseline.edit(report={"cluster": "text"})
    assert "would be refused" not in baseline.run("--dry-run")


CONDA = """#!/bin/sh
# What Snakemake asks of conda; an environment's Python is that of the clone's with the same packages.
case "$*" in
"info --json") echo '{"conda_prefix": "/none", "platform": "linux-64"}' ;;
"--version") echo "conda 24.11.1" ;;
"config "*) echo '{"get": {"channel_priority": "strict"}}' ;;
"env create "*)
    while [ "$1" != --file ]; do shift; done
    stage=driver
    grep -q inspect-ai== "$2" && stage=eval
    grep -q torchtune== "$2" && stage=train
    mkdir -p "$4/bin"
    printf '#!/bin/sh\\nexec ROOT/.venv/%s/bin/python "$@"\\n' "$stage" > "$4/bin/python"
    chmod +x "$4/bin/python" ;;
"clean "*) ;;
*) exit 1 ;;
esac
"""


def test_with_conda_the_same_is_told_by_the_environments_that_snakemake_makes(
    baseline: Sweep, tmp_path_factory: pytest.TempPathFactory
) -> None:
    conda = tmp_path_factory.mktemp("conda") / "conda"
    conda.write_text(CONDA.replace("ROOT", str(ROOT)))
    conda.chmod(0o755)
    baseline.environment["PATH"] = f"{conda.parent}:{os.environ['PATH']}"
    baseline.edit(evaluation={"tasks": [LETTERS, "bad.py@lacks"]})
    assert "evaluation.tasks.1: 'bad.py@lacks' does not load: ValueError" in refuse(baseline, "--sdm", "conda")
    tasks = json.loads((baseline.results / "task_sizes.json").read_text())["tasks"]
    assert tasks["letters"]["samples"] == 6


def override(name: str, seed: int = 0, **sections: Any) -> dict[str, Any]:
    return {"name": name, "seed": seed, "_override": sections}


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "after": 2}, "unk_token": "a"},
}
EIGHT_BIT = {"_component_": "torchao.optim.AdamW8bit"}


@pytest.mark.long  # tests/train says so of each part of a recipe
def test_what_a_recipe_names_and_cannot_be_built_is_told_before_the_first_job(make: Callable[..., Sweep]) -> None:
    runs = [
        override("good", optimizer={**EIGHT_BIT, "fused": None}),
        override("fused", optimizer=EIGHT_BIT),
        override("fused_too", seed=1, optimizer=EIGHT_BIT),
        override("absent", loss={"_component_": "no_such_package.Loss"}),
        override("unknown", lr_scheduler={"num_cycle": 1}),
        override("typed", checkpointer={"model_type": "LAMA3"}),
        override("built", model={"num_heads": 3}),
        override("read", dataset={"_component_": "torchtune.datasets.no_such_dataset"}),
        override("split", tokenizer={"max_seq_length": 3}),
    ]
    sweep = make(variables={}, runs=runs, plan={})
    sweep.edit(evaluation={"enabled": False})
    (sweep.directory / "model/tokenizer.json").write_text(json.dumps(TOKENIZER))
    (sweep.directory / "model/tokenizer_config.json").write_text(json.dumps({"eos_token": "b"}))
    said = refuse(sweep)
    key = f"{sweep.directory}/sweep.yaml: controls._override"
    assert f"{key}.optimizer (point 'fused' and 1 others) cannot be built: TypeError: " in said
    assert "unexpected keyword argument 'fused'. Expected: arguments of its _component_; null removes one" in said
    assert f"{key}.loss (point 'absent') cannot be built: " in said
    assert "Are you sure that module 'no_such_package' is installed?" in said
    assert f"{key}.lr_scheduler (point 'unknown') cannot be built: TypeError: " in said
    assert f"{key}.checkpointer (point 'typed') cannot be built: ValueError: 'LAMA3' is no model_type" in said
    assert f"{key}.model (point 'built') cannot be built: ValueError: " in said
    assert f"{key}.dataset (point 'read') cannot be built: " in said
    assert f"{key}.tokenizer (point 'split') cannot be built: TypeError: ChatTokenizer: got an unexpected" in said
    assert "'good'" not in said
    assert "A run would be refused: " in sweep.run("--dry-run")
    sweep.edit(runs=runs[:1])
    assert "would be refused" not in sweep.call("plan", "--cores", "2")
    assert json.loads((sweep.results / "recipes.json").read_text())["faults"] == []
    (sweep.directory / "model/tokenizer.json").write_text("{}")
    assert "sweep.yaml: the recipe's 'tokenizer' (point 'good') cannot be built: " in refuse(sweep)
