"""Every combination of system prompt, chat template, data format, mode and provider: the model is asked as trained.

What differs is refused, by name. Each choice is met with each other in a pair; all combinations are marked as long.
LORASWEEP_PROMPT_TABLE=FILE writes the outcomes of the combinations that run as a table.
"""

import json
import os
import shutil
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from lorasweep.evaluation.spec import TaskSpec, make_evaluation_spec
from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.points import get_points
from lorasweep.experiment.sections import Task
from lorasweep.experiment.tasks import TaskEntry
from lorasweep.sweep.checks import check_inputs, make_recipe
from lorasweep.util.errors import InputError
from recipes import GIVEN_TEMPLATE
from sweep import ROOT, make_sweep, run_stage

OWN, EXPERIMENTS = "Be brief.", "Answer with a letter."
CHAT = [
    [("user", "after a"), ("assistant", "b")],
    [("user", "after a"), ("assistant", "b"), ("user", "and then?"), ("assistant", "c")],
]

SYSTEM = {
    "none": {},
    "none, and a prefix": {"prefix": "It:"},
    "experiment": {"system_prompt": EXPERIMENTS},
    "task": {"own": OWN},
    "both": {"system_prompt": EXPERIMENTS, "own": OWN},
    "task, which stands": {"own": OWN, "system_prompt": OWN, "entry": ""},
    "both, and the entry's stands": {"own": OWN, "system_prompt": EXPERIMENTS, "entry": EXPERIMENTS},
}
"""`own`: the message that the task brings; `entry`: what the task's entry says. Where the task's message stands, the
training is given the same one. `prefix`: text with which the answer begins."""

TEMPLATES = ("with system role", "without system role", "no template", "given in place of none")
FORMATS = ("instruct", "alpaca", "chat", "sharegpt", "completion")
MODES = ("A by hf", "B1 by hf", "B2 by lorasweep", "baseline by hf", "baseline by lorasweep")

Cell = tuple[str, str, str, str]

ALL: list[Cell] = list(product(SYSTEM, TEMPLATES, FORMATS, MODES))


def choose_pairs() -> set[Cell]:
    """Choose combinations, greedily, until every two choices meet."""
    missing = {pair for cell in ALL for pair in combinations(enumerate(cell), 2)}
    chosen = set()
    while missing:
        best = max(ALL, key=lambda cell: len(missing & {*combinations(enumerate(cell), 2)}))
        chosen.add(best)
        missing -= {*combinations(enumerate(best), 2)}
    return chosen


PAIRS = choose_pairs()


def expect_refusal(cell: Cell) -> str | None:
    """What a refused combination is told, before any job or with the first sample."""
    system, template, form, _ = cell
    has_prompt, entry = "system_prompt" in SYSTEM[system], SYSTEM[system].get("entry")
    if form == "completion" and has_prompt:
        return "does not go with data.format: completion"
    if form in ("chat", "sharegpt") and template == "no template":
        return f"has no chat template, but data.format: {form} "
    if template == "without system role" and has_prompt and form != "completion":
        return "refuses a system message: Conversation roles must alternate"
    if "own" in SYSTEM[system] and entry is None:
        return "brings a system message of its own"
    return None


class Cells:
    """The outcome of each combination: the tokens of training and of evaluation, or the message of the refusal."""

    def __init__(self, folder: Path, models: dict[str, Path], cells: list[Cell]) -> None:
        self.refused: dict[Cell, str] = {}
        self._folder, self._models = folder, models
        self._recipes: dict[tuple[str, str, str], Path] = {}
        evaluations: dict[Cell, dict[str, Any]] = {}
        for cell in cells:
            try:
                evaluations[cell] = self._make(cell)
            except InputError as error:
                self.refused[cell] = str(error)
        said = run_stage("train", "e2e/train_prompts.py", *self._recipes.values())
        self._trained = dict(zip(self._recipes, json.loads(said.splitlines()[-1]), strict=True))
        for cell in list(evaluations):
            if message := next((p for p in self.get_trained(cell) if isinstance(p, str)), None):
                self.refused[cell] = message
        left = {cell: case for cell, case in evaluations.items() if cell not in self.refused}
        (folder / "evaluations.json").write_text(json.dumps(list(left.values())))
        said = run_stage("eval", "e2e/eval_prompts.py", folder / "evaluations.json")
        self.evaluated: dict[Cell, list[list[int]]] = {}
        for cell, outcome in zip(left, json.loads(said.splitlines()[-1]), strict=True):
            if isinstance(outcome, str):
                self.refused[cell] = outcome
            else:
                self.evaluated[cell] = outcome

    def get_trained(self, cell: Cell) -> list[Any]:
        return list(self._trained[cell[:3]])

    def _make(self, cell: Cell) -> dict[str, Any]:
        system, template, form, mode = cell
        number = ALL.index(cell)
        directory = self._folder / str(number)
        sweep = make_sweep(directory, self._models[template], "matrix")
        samples: list[dict[str, Any]] = [{"input": f"after {a}", "output": b} for a, b in ("ab", "bc")]
        if form == "completion":
            samples = [{"text": f"{s['input']} comes {s['output']}", "input": s["input"]} for s in samples]
        if form == "alpaca":
            samples = [{"instruction": "after", "input": a, "output": b} for a, b in (("a", "b"), ("", "c"))]
        if form == "sharegpt":
            names = {"user": "human", "assistant": "gpt"}
            samples = [{"conversations": [{"from": names[r], "value": c} for r, c in messages]} for messages in CHAT]
        if form == "chat":
            samples = [{"messages": [{"role": r, "content": c} for r, c in messages]} for messages in CHAT]
        file = directory / "train.jsonl"
        file.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        given = SYSTEM[system].get("system_prompt")
        sweep.config["model"]["path"] = str(self._models[template])
        sweep.config["data"]["train"] = str(file)
        sweep.edit(runs=[{"name": "point"}], data={"format": form, "system_prompt": given}, controls={"batch_size": 1})
        shutil.rmtree(directory / "model")
        if template.startswith("given"):
            (directory / "own.jinja").write_text(GIVEN_TEMPLATE)
            sweep.edit(model={"chat_template": str(directory / "own.jinja")})
        experiment = load_experiment(sweep.config, "sweep.yaml")
        points = get_points(experiment, sweep.results / "points.json")
        check_inputs(experiment, points.values(), [TASK], sweep.results)
        if cell[:3] not in self._recipes:
            self._recipes[cell[:3]] = directory / "recipe.yaml"
            (directory / "recipe.yaml").write_text(make_recipe(experiment, points["point"], str(directory / "point")))
        own = {"system_prompt": SYSTEM[system].get("entry"), "assistant_prefix": SYSTEM[system].get("prefix")}
        entry = TaskSpec(name="asked", task="none", args={}, limit=None, **own)
        kind, _, provider = mode.partition(" by ")
        mode: Any = "base" if kind == "baseline" else kind
        point = points["point"]
        spec = make_evaluation_spec(experiment, [], [], mode, "", point.model, point.data)
        spec = spec.model_copy(update={"tasks": [entry], "max_connections": 1, "max_tokens": 1})
        adapter = {} if kind == "baseline" else {"adapter": str(self._folder / f"adapter of {template}")}
        return {
            "spec": spec.model_dump(mode="json"),
            "file": str(file),
            "logs": str(directory / "logs"),
            "provider": provider,
            "own": SYSTEM[system].get("own"),
            **adapter,
        }


TASK = TaskEntry("asked", Task(task="none"), None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, model: Path, model_without_template: Path) -> dict[str, Path]:
    without_role = tmp_path_factory.mktemp("models") / "mistral"
    shutil.copytree(model, without_role)
    shutil.copyfile(ROOT / "tests/chat_templates/mistral_0_2.jinja", without_role / "chat_template.jinja")
    folders = (model, without_role, model_without_template, model_without_template)
    return dict(zip(TEMPLATES, folders, strict=True))


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path]
) -> Cells:
    items = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    cells = [item.callspec.params["cell"] for item in items if hasattr(item, "callspec")]  # type: ignore[attr-defined]
    outcomes = Cells(tmp_path_factory.mktemp("matrix"), models, cells)
    if file := os.environ.get("LORASWEEP_PROMPT_TABLE"):
        Path(file).write_text(write_table(outcomes, cells))
    return outcomes


def write_table(outcomes: Cells, cells: list[Cell]) -> str:
    """Write a table: a row for each system prompt, template and format; a column for each mode."""
    rows = ["| system prompt | template | format | " + " | ".join(MODES) + " |", "|---" * (3 + len(MODES)) + "|"]
    for row in dict.fromkeys(cell[:3] for cell in cells):
        said = [
            "" if (cell := (*row, mode)) not in cells else "same" if cell in outcomes.evaluated else "refused"
            for mode in MODES
        ]
        rows.append("| " + " | ".join([*row, *said]) + " |")
    reasons = Counter(expect_refusal(cell) for cell in outcomes.refused)
    rows += ["", *(f"- refused ({number}): ... {reason} ..." for reason, number in reasons.items())]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=() if c in PAIRS else pytest.mark.long, id="-".join(c)) for c in ALL]
)
def test_generate_gets_the_tokens_that_training_saw(outcomes: Cells, cell: Cell) -> None:
    if reason := expect_refusal(cell):
        assert reason in outcomes.refused.get(cell, "not refused")
        return
    assert cell not in outcomes.refused, outcomes.refused[cell]
    trained, evaluated = outcomes.get_trained(cell), outcomes.evaluated[cell]
    assert len(trained) == len(evaluated) == 2
    assert min(map(len, evaluated)) > len("after")
    if prefix := SYSTEM[cell[0]].get("prefix"):
        begun = [ord(letter) - ord("!") for letter in prefix]  # a byte is a token
        assert [tokens[-len(begun) :] for tokens in evaluated] == [begun, begun]
        evaluated = [tokens[: -len(begun)] for tokens in evaluated]
    if cell[2] == "completion":  # all is learnt: the prompt is what it begins with
        trained = [tokens[: len(prompt)] for tokens, prompt in zip(trained, evaluated, strict=True)]
    assert trained == evaluated
