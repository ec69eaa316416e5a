"""A system message stands in a prompt once: the experiment's, or the one that the task's entry names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, task_with
from inspect_ai.agent import as_solver, react
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.solver import (
    basic_agent,
    chain,
    chain_of_thought,
    generate,
    multiple_choice,
    prompt_template,
    self_critique,
    solver,
    system_message,
    use_tools,
)

from evaluation_specs import make_spec
from lorasweep.evaluation.inspect_tasks import EvaluationError, run_task
from lorasweep.evaluation.spec import TaskSpec
from lorasweep.evaluation.system_messages import find_system_message

OWN = "Be brief."


@solver
def composed() -> Any:
    """A solver that hands on to one that it was given."""
    inner = system_message(OWN)

    async def solve(state: Any, generate: Any) -> Any:
        return await inner(state, generate)

    return solve


@solver
def made_within() -> Any:
    async def solve(state: Any, generate: Any) -> Any:
        state.messages.insert(0, ChatMessageSystem(content=OWN))
        return await generate(state)

    return solve


@solver
def called() -> Any:
    class Insert:
        async def __call__(self, state: Any, generate: Any) -> Any:
            state.messages.insert(0, ChatMessageSystem(content=OWN))
            return await generate(state)

    return Insert()


def make_task(*solvers: Any, **arguments: Any) -> Task:
    settings: dict[str, Any] = {"dataset": [Sample(input="after a", target="b")], "solver": list(solvers) or generate()}
    return Task(**{**settings, **arguments})


CHAT = [ChatMessageSystem(content=OWN), ChatMessageUser(content="after a")]

BRINGS: dict[str, tuple[Callable[[], Task], str]] = {
    "a solver": (lambda: make_task(system_message(OWN), generate()), "its solver"),
    "a chain": (lambda: make_task(chain(chain_of_thought(), chain(system_message(OWN))), generate()), "its solver"),
    "a solver in another": (lambda: make_task(composed(), generate()), "its solver"),
    "a message within": (lambda: make_task(made_within()), "its solver"),
    "a class": (lambda: make_task(called()), "its solver"),
    "the setup": (lambda: make_task(setup=system_message(OWN)), "its setup"),
    "an agent": (lambda: make_task(as_solver(react())), "its solver"),
    "the basic agent": (lambda: make_task(basic_agent()), "its solver"),
    "a sample": (lambda: make_task(dataset=[Sample(input="a"), Sample(input=[*CHAT])]), "sample 2 of its data"),
    "the configuration": (lambda: make_task(config=GenerateConfig(system_message=OWN)), "its configuration"),
    "a replaced solver": (lambda: task_with(make_task(), solver=[system_message(OWN), generate()]), "its solver"),
}

BRINGS_NONE: dict[str, Callable[[], Task]] = {
    "generate": make_task,
    "solvers of Inspect": lambda: make_task(
        prompt_template("{prompt}"), chain_of_thought(), use_tools([]), self_critique(), multiple_choice()
    ),
    "branches": lambda: make_task(chain(generate()), generate()),
    "an agent without a prompt": lambda: make_task(as_solver(react(prompt=None))),
    "a user's message": lambda: make_task(dataset=[Sample(input=[ChatMessageUser(content="a")])]),
}


@pytest.mark.parametrize("name", BRINGS)
def test_a_system_message_of_the_task_s_own_is_found_without_running_it(name: str) -> None:
    make, place = BRINGS[name]
    found = find_system_message(make())
    assert found
    assert found.startswith(place)


@pytest.mark.parametrize("name", BRINGS_NONE)
def test_none_is_found_where_there_is_none(name: str) -> None:
    assert find_system_message(BRINGS_NONE[name]()) is None


def test_only_samples_that_are_evaluated_count() -> None:
    made = make_task(dataset=[Sample(input="a"), Sample(input=[*CHAT])])
    assert find_system_message(made, limit=1) is None


TASKS = """
import inspect_ai.model
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageSystem, ChatMessageUser, GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, solver, system_message

SAMPLES = [Sample(input="after a", target="b")]
CHAT = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="after a")]


@solver
def hidden():
    async def solve(state, generate):
        state.messages.insert(0, getattr(inspect_ai.model, "ChatMessage" + "System")(content="Be brief."))
        return await generate(state)

    return solve


@task
def plain():
    return Task(SAMPLES, scorer=includes())


@task
def by_solver():
    return Task(SAMPLES, solver=[system_message("Be brief."), generate()], scorer=includes())


@task
def by_sample():
    return Task([Sample(input=CHAT, target="b")], scorer=includes())


@task
def by_configuration():
    return Task(SAMPLES, config=GenerateConfig(system_message="Be brief."), scorer=includes())


@task
def by_hidden():
    return Task(SAMPLES, solver=[hidden()], scorer=includes())
"""


@modelapi(name="recorder")
class Recorder(ModelAPI):  # type: ignore[misc]
    """A model that records the system messages of each request."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen: list[str] = []

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:
        self.seen += [message.text for message in input if message.role == "system"]
        output = ModelOutput.from_content("recorder", "b")
        output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)
        return output


BRINGING = ("by_solver", "by_sample", "by_configuration", "by_hidden")


def ask(folder: Path, task: str, experiments: str | None, entry: str | None) -> list[str]:
    """Evaluate a task with Inspect; return the system messages that the model got, as its log says."""
    (folder / "tasks.py").write_text(TASKS)
    asked = TaskSpec(name=task, task=f"{folder}/tasks.py@{task}", args={}, limit=None, system_prompt=entry)
    spec = make_spec(backend="vllm", tasks=[asked], system_prompt=experiments)
    model = get_model("recorder/model", memoize=False, config=spec.make_generate_config(temperature=0))
    log, _ = run_task(spec, asked, model, folder / "logs", "point", {})
    (event,) = (event for event in read_eval_log(str(log)).samples[0].events if event.event == "model")  # type: ignore[index]
    assert [message.text for message in event.input if message.role == "system"] == model.api.seen
    return list(model.api.seen)


@pytest.mark.parametrize("experiments", [None, "Answer."])
@pytest.mark.parametrize("entry", [None, "", "Tell."])
def test_a_task_without_one_is_asked_with_the_experiment_s_or_its_entry_s(
    tmp_path: Path, experiments: str | None, entry: str | None
) -> None:
    expected = experiments if entry is None else entry
    assert ask(tmp_path, "plain", experiments, entry) == ([expected] if expected else [])


@pytest.mark.parametrize("experiments", [None, "Answer."])
@pytest.mark.parametrize("task", BRINGING)
def test_a_task_with_one_is_refused_unless_its_entry_says_which_stands(
    tmp_path: Path, task: str, experiments: str | None
) -> None:
    with pytest.raises(EvaluationError) as error:
        ask(tmp_path, task, experiments, entry=None)
    assert f"'{task}' brings a system message of its own" in str(error.value)
    assert 'system_prompt: ""' in str(error.value)


@pytest.mark.parametrize("experiments", [None, "Answer."])
@pytest.mark.parametrize("task", BRINGING)
def test_the_message_that_the_entry_names_stands_alone(tmp_path: Path, task: str, experiments: str | None) -> None:
    (tmp_path / "own").mkdir()
    assert ask(tmp_path / "own", task, experiments, entry="") == [OWN]
    (tmp_path / "entry").mkdir()
    assert ask(tmp_path / "entry", task, experiments, entry="Tell.") == ["Tell."]
