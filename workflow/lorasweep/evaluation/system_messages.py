"""The rule of system messages: the experiment's stands in a prompt exactly once.

A task may bring its own: in its samples, its configuration or its solver. It is refused, unless its entry in the
experiment says which message stands: `system_prompt: ""` the task's, a text the entry's.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Any

from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.util.errors import InputError

EXPECTED = 'in its entry, system_prompt: "" for the task\'s message alone, or a text that replaces it'

_NAMES = {"system_message", "append_system_message", "ChatMessageSystem"}
"""What a solver's code names if it adds a system message."""


def find_system_message(task: Any, limit: int | None = None) -> str | None:
    """Return where a loaded Inspect task brings a system message of its own; `None` if it brings none.

    A solver is searched without being run: what it computes elsewhere is seen by `hold_to_rule` only. `limit` is the
    number of samples that are evaluated.
    """
    if task.config.system_message:
        return "its configuration (GenerateConfig)"
    for number, sample in enumerate(list(task.dataset)[:limit], start=1):
        if not isinstance(sample.input, str) and any(message.role == "system" for message in sample.input):
            return f"sample {number} of its data"
    return next((f"its {part}" for part in ("setup", "solver") if _brings(getattr(task, part), set())), None)


def _brings(value: Any, seen: set[int]) -> bool:
    """Whether a solver, or a value that it holds, adds a system message."""
    from inspect_ai._util.registry import is_registry_object, registry_log_name
    from inspect_ai.model import ChatMessageSystem

    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, ChatMessageSystem) or (is_registry_object(value) and registry_log_name(value) in _NAMES):
        return True
    return any(_brings(part, seen) for part in _list_parts(value)) or (
        isinstance(value, FunctionType)
        and not value.__module__.startswith("inspect_ai.")
        and any(_NAMES & {*code.co_names} for code in _list_code(value.__code__))
    )


def _list_parts(value: Any) -> list[Any]:
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ())]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):  # a chain of solvers is one, too
        return list(value)
    steps = [*getattr(value, "steps", ()), getattr(value, "finish", None)] if hasattr(value, "steps") else []
    is_called = callable(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    return [*steps, *(vars(value).values() if is_called else ()), *([type(value).__call__] if is_called else ())]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _list_code(code: Any) -> Iterator[Any]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from _list_code(constant)


def refuse_system_message(name: str, place: str, key: str = "evaluation.tasks") -> InputError:
    """Return the error for a task that brings a system message without an entry that says which one stands."""
    return InputError(f"{key}: '{name}' brings a system message of its own ({place}), which training has not", EXPECTED)


def hold_to_rule(model: Any, spec: EvaluationSpec, task: TaskSpec) -> None:
    """Let a model be asked by the rule: set its system message for a task, and refuse or leave out others."""
    own = spec.system_prompt if task.system_prompt is None else task.system_prompt
    model.config = model.config.model_copy(update={"system_message": own or None})
    ask, answer = type(model).generate, type(model.api).generate

    async def ask_once(input: Any, *arguments: Any, **named: Any) -> Any:
        if task.system_prompt and not isinstance(input, str):
            input = [message for message in input if message.role != "system"]
        return await ask(model, input, *arguments, **named)

    async def answer_checked(input: Any, tools: Any, tool_choice: Any, config: Any) -> Any:
        found = [message.text for message in input if message.role == "system"]
        if task.system_prompt != "" and found != ([own] if own else []):
            raise refuse_system_message(task.name, f"{next(text for text in found if text != own)[:60]!r}")
        return await answer(model.api, input, tools, tool_choice, config)

    model.generate, model.api.generate = ask_once, answer_checked
