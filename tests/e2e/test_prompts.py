"""A model is asked as it was trained: the same sample becomes the same prompt tokens in training and in evaluation."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweep import ROOT, Sweep, make_sweep, run_stage

sys.path.insert(0, str(ROOT / "workflow"))
from lorasweep.evaluation import TaskSpec, make_evaluation_spec
from lorasweep.experiment import load_experiment

CHAT = [
    [("user", "after a"), ("assistant", "b")],
    [("user", "after a"), ("assistant", "b"), ("user", "and then?\n"), ("assistant", "c")],
]
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "template": ([], {}),
    "template and system prompt": ([], {"system_prompt": "Answer with a letter."}),
    "no template": (["--no-chat-template"], {}),
    "no template, and system prompt": (["--no-chat-template"], {"system_prompt": "Answer with a letter."}),
    "system prompt of the task": ([], {"system_prompt": "Answer with a letter."}),
    "completion": ([], {"format": "completion", "max_samples": 2}),
    "completion without template": (["--no-chat-template"], {"format": "completion"}),
    "chat": ([], {"format": "chat"}),
    "chat and system prompt": ([], {"format": "chat", "system_prompt": "Answer with a letter."}),
}


@pytest.fixture
def sweep(tmp_path: Path, make_model: Callable[..., Path], request: pytest.FixtureRequest) -> Sweep:
    model_arguments, data = CASES[request.param]
    sweep = make_sweep(tmp_path, make_model("--family", "llama3", *model_arguments), "prompts")
    sweep.edit(runs=[{"name": "point"}], data=data, controls={"batch_size": 1})
    lines = (tmp_path / "train.jsonl").read_text().splitlines()[:3]
    if data.get("format") == "completion":
        samples = [{"text": f"{s['input']} comes {s['output']}", "input": s["input"]} for s in map(json.loads, lines)]
        lines = [json.dumps(sample) for sample in samples]
    if data.get("format") == "chat":
        samples = [{"messages": [{"role": role, "content": text} for role, text in sample]} for sample in CHAT]
        lines = [json.dumps(sample) for sample in samples]
    (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    return sweep


@pytest.mark.parametrize("sweep", CASES, indirect=True)
def test_training_and_evaluation_see_the_same_prompt_tokens(sweep: Sweep, request: pytest.FixtureRequest) -> None:
    sweep.run("configure_all")
    recipe = sweep.results / "point/recipe.yaml"
    trained = json.loads(run_stage("train", "e2e/train_prompts.py", recipe, cwd=sweep.directory).splitlines()[-1])
    experiment = load_experiment(sweep.config, "sweep.yaml")
    task = TaskSpec(name="prompts", task="none", args={}, limit=None)
    spec = make_evaluation_spec(experiment, [], [], "base", "").model_copy(update={"max_connections": 1})
    if request.node.callspec.id.endswith("of the task"):
        task = task.model_copy(update={"system_prompt": spec.system_prompt})
        spec = spec.model_copy(update={"system_prompt": "This is not for this task."})
    spec = spec.model_copy(update={"tasks": [task]})
    arguments = [spec.model_dump_json(), "train.jsonl", sweep.directory / "logs"]
    said = run_stage("eval", "e2e/eval_prompts.py", *arguments, cwd=sweep.directory)
    evaluated = json.loads(said.splitlines()[-1])
    samples = (sweep.directory / "train.jsonl").read_text().splitlines()
    if limit := sweep.config["data"].get("max_samples"):
        samples, evaluated = samples[:limit], evaluated[:limit]
    assert len(trained) == len(evaluated) == len(samples)
    assert min(map(len, trained)) > len("after a")
    if sweep.config["data"].get("format") == "completion":
        # All is learnt: the prompt is what it begins with, and it ends where generation will stop.
        assert [tokens[: len(prompt)] for tokens, prompt in zip(trained, evaluated, strict=True)] == evaluated
        assert len({tokens[-1] for tokens in trained}) == 1
    elif sweep.config["data"].get("format") == "chat":
        # In a longer conversation training learns earlier answers too; the prompt is what stands before the first.
        assert trained[0] == evaluated[0]
        assert evaluated[1][: len(trained[1])] == trained[1]
    else:
        assert trained == evaluated
