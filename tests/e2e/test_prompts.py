"""A model is asked as it was trained: the same sample becomes the same prompt tokens in training and in evaluation."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sweep import MODES, POINTS, ROOT, SUMMED_UP, make_sweep, run_stage

sys.path.insert(0, str(ROOT / "workflow"))
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec, make_evaluation_spec
from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import get_points
from lorasweep.sweep.checks import make_recipe

CHAT = [
    [("user", "after a"), ("assistant", "b")],
    [("user", "after a"), ("assistant", "b"), ("user", "and then?\n"), ("assistant", "c")],
]
PROMPT = "Which letter is {{it}} that comes {input}?\n"
ASKED = "Which letter is {it} that comes after a?\n"
TASKS = ("all", "own", "bare")
ANOTHER = "This is not for this one: {input}"

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "template": ([], {}),
    "template and system prompt": ([], {"system_prompt": "Answer with a letter."}),
    "no template": (["--no-chat-template"], {}),
    "no template, and system prompt": (["--no-chat-template"], {"system_prompt": "Answer with a letter."}),
    "system prompt of the task": ([], {"system_prompt": "Answer with a letter."}),
    "prompt": ([], {"prompt": PROMPT}),
    "no template, and prompt": (["--no-chat-template"], {"prompt": PROMPT, "system_prompt": "Answer with a letter."}),
    "prompts of the run": ([], {"prompt": ANOTHER, "system_prompt": "This neither."}),
    "no prompts of the run": ([], {"prompt": ANOTHER, "system_prompt": "This neither."}),
    "prompt of the task": ([], {"prompt": PROMPT, "system_prompt": "Answer with a letter."}),
    "no prompt of the task": ([], {}),
    "completion": ([], {"format": "completion", "max_samples": 2}),
    "completion without template": (["--no-chat-template"], {"format": "completion"}),
    "chat": ([], {"format": "chat"}),
    "chat and system prompt": ([], {"format": "chat", "system_prompt": "Answer with a letter."}),
}


RUNS: dict[str, dict[str, Any]] = {
    "prompts of the run": {"prompt": PROMPT, "system_prompt": "Answer with a letter."},
    "no prompts of the run": {"prompt": "{input}", "system_prompt": ""},
}


@dataclass(frozen=True)
class Case:
    """Data and an experiment, with the recipe of its point and the specification of its evaluation."""

    directory: Path
    data: dict[str, Any]
    recipe: Path
    spec: EvaluationSpec


def make_case(directory: Path, model: Path, case: str) -> Case:
    data = CASES[case][1]
    sweep = make_sweep(directory, model, "prompts")
    lines = (directory / "train.jsonl").read_text().splitlines()[:3]
    if data.get("format") == "completion":
        samples = [{"text": f"{s['input']} comes {s['output']}", "input": s["input"]} for s in map(json.loads, lines)]
        lines = [json.dumps(sample) for sample in samples]
    if data.get("format") == "chat":
        samples = [{"messages": [{"role": role, "content": text} for role, text in sample]} for sample in CHAT]
        lines = [json.dumps(sample) for sample in samples]
    (directory / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    # Where the processes that read these are started is not where they lie.
    sweep.config["model"]["path"] = str(directory / "model")
    sweep.config["data"]["train"] = str(directory / "train.jsonl")
    sweep.edit(runs=[{"name": "point", **RUNS.get(case, {})}], data=data, controls={"batch_size": 1})
    experiment = load_experiment(sweep.config, "sweep.yaml")
    point = get_points(experiment, sweep.results / "points.json")["point"]
    recipe = directory / "recipe.yaml"
    recipe.write_text(make_recipe(experiment, point, str(directory / "point")))
    task = TaskSpec(name="prompts", task="none", args={}, limit=None)
    spec = make_evaluation_spec(experiment, [], [], "base", "", point.model, point.data)
    spec = spec.model_copy(update={"max_connections": 1})
    if case.endswith("of the task"):
        task = task.model_copy(update={"system_prompt": spec.system_prompt or "", "prompt": spec.prompt or ""})
        spec = spec.model_copy(update={"system_prompt": "This is not for this task.", "prompt": ANOTHER})
    return Case(directory, data, recipe, spec.model_copy(update={"tasks": [task]}))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, model: Path, model_without_template: Path) -> dict[str, Case]:
    models = {True: model_without_template, False: model}
    folder = tmp_path_factory.mktemp("prompts")
    return {
        name: make_case(folder / str(number), models["--no-chat-template" in arguments], name)
        for number, (name, (arguments, _)) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def trained_tokens(cases: dict[str, Case]) -> dict[str, list[list[int]]]:
    """The prompts that the training of each case sees."""
    said = run_stage("train", "e2e/train_prompts.py", *[case.recipe for case in cases.values()])
    return dict(zip(cases, json.loads(said.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def evaluated_tokens(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """The prompts that the evaluation of each case sees."""
    evaluations = [
        {
            "spec": case.spec.model_dump(mode="json"),
            "file": str(case.directory / "train.jsonl"),
            "logs": str(case.directory / "logs"),
        }
        for case in cases.values()
    ]
    file = tmp_path_factory.mktemp("prompts") / "evaluations.json"
    file.write_text(json.dumps(evaluations))
    said = run_stage("eval", "e2e/eval_prompts.py", file)
    return dict(zip(cases, json.loads(said.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_training_and_evaluation_see_the_same_prompt_tokens(
    cases: dict[str, Case],
    trained_tokens: dict[str, list[list[int]]],
    evaluated_tokens: dict[str, list[list[int]]],
    name: str,
) -> None:
    data, trained, evaluated = cases[name].data, trained_tokens[name], evaluated_tokens[name]
    samples = (cases[name].directory / "train.jsonl").read_text().splitlines()
    if limit := data.get("max_samples"):
        samples, evaluated = samples[:limit], evaluated[:limit]
    assert len(trained) == len(evaluated) == len(samples)
    assert min(map(len, trained)) > len("after a")
    if data.get("format") == "completion":
        # All is learnt: the prompt is what it begins with, and it ends where generation will stop.
        assert [tokens[: len(prompt)] for tokens, prompt in zip(trained, evaluated, strict=True)] == evaluated
        assert len({tokens[-1] for tokens in trained}) == 1
    else:
        assert trained == evaluated
    # A byte is a token, and its number the byte's place in the alphabet of the tokenizer.
    assert contains(evaluated[0], ASKED) == ("prompt" in name and not re.search("^no prompt|system", name))


def contains(tokens: list[int], text: str) -> bool:
    """Whether a text's bytes stand somewhere in the prompt; printable ones are numbered in their order, from '!' on."""
    numbers = [ord(character) - ord("!") for character in text if "!" <= character <= "~"]
    return any(numbers == found for found in windows([t for t in tokens if t <= ord("~") - ord("!")], len(numbers)))


def windows(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[start : start + size] for start in range(len(tokens) - size + 1)]


@pytest.mark.long  # the matrix says so of each way to be asked
def test_points_that_are_asked_otherwise_are_evaluated_so_in_one_sweep(tmp_path: Path, model: Path) -> None:
    sweep = make_sweep(tmp_path, model, "asked", data={"train": "train.jsonl"})
    runs = [{"name": "plain"}, {"name": "asked", "prompt": PROMPT, "system_prompt": "Be brief."}]
    tasks = [
        {"task": "tasks.py@letters", "name": name, "limit": 1, **options}
        for name, options in {"all": {}, "own": {"prompt": "Now: {input}"}, "bare": {"prompt": ""}}.items()
    ]
    sweep.edit(
        runs=[run | {"seed": seed} for seed, run in enumerate(runs)],
        controls={"epochs": 1, "max_steps_per_epoch": 1},
        evaluation={"merge_adapters": False, "tasks": tasks, "max_tokens": 1},
    )
    assert sweep.plan()["evaluate_adapters"] == 2
    sweep.run("--until", "cleanup")
    assert sweep.plan() == SUMMED_UP
    files = {(p, t): sweep.results / p / f"eval/{t}.eval" for p in ("plain", "asked", "baseline") for t in TASKS}
    logs = json.loads(run_stage("eval", "e2e/read_logs.py", *files.values()))
    said = {key: logs[str(file)]["prompt"][-1][1] for key, file in files.items()}
    assert said == {
        **{(point, "all"): ASKED if point == "asked" else "after a" for point in ("plain", "asked", "baseline")},
        **{(point, "own"): "Now: after a" for point in ("plain", "asked", "baseline")},
        **{(point, "bare"): "after a" for point in ("plain", "asked", "baseline")},
    }
    settings = json.loads((sweep.results / "asked/manifest.json").read_text())["settings"]
    assert (settings["prompt"], settings["system_prompt"]) == (PROMPT, "Be brief.")
    # Another prompt is another training and evaluation of that point alone.
    sweep.edit(runs=[run | {"seed": seed} for seed, run in enumerate([runs[0], runs[1] | {"prompt": ANOTHER}])])
    plan = sweep.plan()
    assert (plan["train"], plan["evaluate_adapters"], plan["publish"]) == (1, 1, 1)


@pytest.mark.long  # tests/train and tests/eval say so of the tokens
def test_an_end_that_only_the_template_writes_is_learnt_and_stops_answers_in_every_mode(
    tmp_path: Path, model: Path
) -> None:
    """As of many base models: no file names the token that ends a turn, and the base has never learnt it."""
    tasks = [{"task": "tasks.py@letters", "limit": 3}]
    sweep = make_sweep(tmp_path, model, "ends", **MODES, evaluation={"max_tokens": 8, "tasks": tasks})
    template = (sweep.directory / "model/chat_template.jinja").read_text()
    (sweep.directory / "model/chat_template.jinja").write_text(f'{{# {{{{ strftime_now("%Y") }}}} #}}{template}')
    settings = json.loads((sweep.directory / "model/tokenizer_config.json").read_text()) | {"eos_token": "<|begin|>"}
    (sweep.directory / "model/tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        file = sweep.directory / "model" / name
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"eos_token_id": content["bos_token_id"], "pad_token_id": None}))
    sweep.run()
    ends = ["<|im_end|>", "<|begin|>"]
    for point in (*POINTS.values(), "baseline"):
        metrics = json.loads((sweep.results / point / "eval/metrics.json").read_text())
        assert metrics["end_tokens"] == ends
        assert metrics["template_date"] == "2024-07-26"
    for point in POINTS.values():
        record = json.loads((sweep.results / point / "adapter/lorasweep.json").read_text())
        assert record["end_tokens"] == ends
        assert record["template_date"] == "2024-07-26"
    files = [sweep.results / point / "eval/letters.eval" for point in POINTS.values()]
    for log in json.loads(run_stage("eval", "e2e/read_logs.py", *files)).values():
        assert log["metadata"]["end_tokens"] == ends
        assert list(log["completions"].values()) == ["b", "c", "d"]
        assert log["answer_tokens"] == 2
