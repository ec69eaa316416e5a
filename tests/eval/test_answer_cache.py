"""Inspect's cache of answers never gives one model's answers under another model's name, however a task asks for it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import read_eval_log
from inspect_ai.model import GenerateConfig, ModelAPI, ModelOutput, ModelUsage, get_model, modelapi
from inspect_ai.model._model import init_model_roles

from evaluation_specs import make_spec
from lorasweep.evaluation import roles
from lorasweep.evaluation.answer_cache import switch_off_cache
from lorasweep.evaluation.inspect_tasks import run_task
from lorasweep.evaluation.spec import RoleSpec, TaskSpec
from tiny_model import make_model, make_tokenizer

TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import CachePolicy, GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver

SAMPLES = [Sample(input="after a", target="b")]


@solver
def directly():
    async def solve(state, generate):
        state.output = await get_model().generate(state.messages, [], None, GenerateConfig(), CachePolicy(expiry=None))
        return state

    return solve


@task
def by_generate():
    return Task(SAMPLES, solver=generate(cache=True), scorer=includes())


@task
def by_configuration():
    return Task(SAMPLES, config=GenerateConfig(cache=True), scorer=includes())


@task
def by_the_model():
    return Task(SAMPLES, solver=directly(), scorer=includes())
"""


@modelapi(name="teller")
class Teller(ModelAPI):  # type: ignore[misc]
    """A model that answers with what its weights are said to be."""

    def __init__(self, *arguments: Any, weights: str = "", **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.weights = weights

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
        output = ModelOutput.from_content("teller", self.weights)
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INSPECT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("task", ["by_generate", "by_configuration", "by_the_model"])
def test_a_model_answers_itself_after_another_of_its_name(tmp_path: Path, cache: Path, task: str) -> None:
    (tmp_path / "tasks.py").write_text(TASKS)
    asked = TaskSpec(name=task, task=f"{tmp_path}/tasks.py@{task}", args={}, limit=None)
    spec = make_spec(backend="vllm", tasks=[asked])
    for weights in ("old", "new"):
        model = get_model("teller/point", memoize=False, weights=weights)
        log, _ = run_task(spec, asked, model, tmp_path / weights, "point", {})
        assert [sample.output.completion for sample in read_eval_log(str(log)).samples or []] == [weights]
    assert not cache.exists()


def ask(model: Any) -> str:
    return str(asyncio.run(model.generate("after a", cache=True)).completion)


def test_so_does_a_role_s_model_that_is_asked_for_with_a_configuration() -> None:
    for weights in ("old", "new"):
        model = get_model("teller/judge", memoize=False, weights=weights)
        switch_off_cache(model)
        init_model_roles({"grader": model})
        copied = get_model(role="grader", config=GenerateConfig(max_tokens=3))
        assert copied.config.max_tokens == 3
        assert ask(copied) == ask(model) == weights


def test_the_cache_is_off_for_a_local_judge_and_on_for_one_on_a_server(tmp_path: Path, cache: Path) -> None:
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model("llama3", tokenizer, seed=0).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    local = RoleSpec(model=f"hf/{tmp_path}/judge", config={"max_tokens": 1}, args={})
    local = local.model_copy(update={"fingerprint": roles.fingerprint_role(local)})
    served = RoleSpec(model="teller/judge", config={}, args={"weights": "old"})
    opened = roles.open_roles(make_spec(model_roles={"local": local, "served": served}))
    ask(opened["local"])
    assert not cache.exists()
    ask(opened["served"])
    opened["served"].api.weights = "new"
    assert ask(opened["served"]) == "old"
