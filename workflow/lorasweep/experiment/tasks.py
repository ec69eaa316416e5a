"""The experiment's Inspect tasks, checked without importing Inspect or running their code."""

import ast
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.experiment.sections import NAME_PATTERN, NAME_RULE, AnyTask, Evaluation, Prune, Task, ValidationTask
from lorasweep.util.errors import InputError, nearest


@dataclass(frozen=True)
class TaskEntry:
    """A task of the experiment, with the name of its log."""

    name: str
    spec: AnyTask
    file: Path | None
    """The file that defines the task; `None` if an installed package registers it."""
    place: str = ""
    """The key of its entry in the experiment, for messages."""

    @property
    def files(self) -> list[str]:
        """Files that define the task. Changing one repeats the evaluation."""
        own = [reference.partition("@")[0] for _, reference in self._references if _is_in_file(reference)]
        return [*([str(self.file)] if self.file else []), *own, *self.spec.files]

    @property
    def registered(self) -> list[tuple[str, str]]:
        """Parts that an installed package registers, as pairs of kind (`task`, `solver`, `scorer`) and name."""
        task = [] if self.file else [("task", self.spec.task)]
        return [*task, *(pair for pair in self._references if not _is_in_file(pair[1]))]

    @property
    def _references(self) -> list[tuple[str, str]]:
        return [(kind, name) for kind in _REPLACED if (name := getattr(self.spec, kind))]


_REPLACED = {"solver": ("solver", "agent"), "scorer": ("scorer",)}
"""Replaceable parts of a task, by key, with the Inspect decorators that define such parts."""


def get_tasks(tasks: list[Task]) -> list[TaskEntry]:
    """Check the tasks and return them with their names.

    Raises:
        InputError: A file is missing, a file does not define the task, solver or scorer, an argument is unknown or
            missing, or two tasks have the same name.
    """
    entries = [_make_entry(spec, f"evaluation.tasks.{index}") for index, spec in enumerate(tasks)]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"evaluation.tasks: two tasks are named '{name}'; give one of them another 'name'")
    return entries


def get_validation_task(evaluation: Evaluation, tasks: Iterable[TaskEntry]) -> TaskEntry | None:
    """Check the task that chooses the best epoch, and return it; `None` if there is none.

    Raises:
        InputError: It is invalid as one of `tasks` would be, or has the name or the samples of one of them.
    """
    place = "evaluation.validation_task"
    return _get_choosing_task(evaluation.validation_task, place, tasks, "the epoch that they judge")


def get_pruning_task(prune: Prune | None, tasks: Iterable[TaskEntry]) -> TaskEntry | None:
    """Check the task by whose scores trainings stop, and return it; `None` if there is none.

    Raises:
        InputError: As `get_validation_task`.
    """
    return _get_choosing_task(prune.task if prune else None, "prune.by", tasks, "the points that they judge")


def _get_choosing_task(
    spec: ValidationTask | None, place: str, tasks: Iterable[TaskEntry], judged: str
) -> TaskEntry | None:
    if spec is None:
        return None
    entry = _make_entry(spec, place)
    for task in tasks:
        if _get_source(task) == _get_source(entry):
            raise InputError(
                f"{entry.place}: {entry.spec.task!r} has the samples of {task.place} ('{task.name}'), whose scores "
                f"would be too good: they would choose {judged}",
                "other samples, by other args or another task",
            )
        if task.name == entry.name:
            raise InputError(
                f"{entry.place}: {task.place} is named '{task.name}' too",
                f"a 'name' of its own, such as dev_{task.name}",
            )
    return entry


def _get_source(entry: TaskEntry) -> tuple[str, dict[str, Any]]:
    """Return what the samples of a task come from: its function, and the arguments with the function's defaults."""
    if not entry.file:
        return entry.spec.task, entry.spec.args
    functions = _read_functions(entry.file, ("task",), entry.place)
    function = entry.spec.task.partition("@")[2] or next(iter(functions))
    found = functions[function]
    named = [*found.posonlyargs, *found.args]
    pairs = [
        *zip(reversed(named), reversed(found.defaults), strict=False),
        *zip(found.kwonlyargs, found.kw_defaults, strict=True),
    ]
    defaults = {parameter.arg: _read_default(default) for parameter, default in pairs if default}
    return f"{os.path.realpath(entry.file)}@{function}", {**defaults, **entry.spec.args}


def _read_default(default: ast.expr) -> Any:
    try:
        return ast.literal_eval(default)
    except ValueError:
        return ast.unparse(default)


def _make_entry(spec: AnyTask, where: str) -> TaskEntry:
    for kind, decorators in _REPLACED.items():
        _check_replaced(kind, decorators, spec, where)
    for index, name in enumerate(spec.files):
        if not Path(name).is_file():
            raise InputError(f"{where}.files.{index}: no such file: {name}")
    if not _is_in_file(spec.task):
        return _named(spec, spec.task.rpartition("/")[2], None, where)
    function = _check_function(spec.task, ("task",), spec.args, where, f"{where}.args")
    return _named(spec, function, Path(spec.task.partition("@")[0]), where)


def _named(spec: AnyTask, default: str, file: Path | None, where: str) -> TaskEntry:
    name = spec.name or default
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise InputError(
            f"{where}: {spec.task!r} is invalid",
            f"file.py@task, or a registered name; its 'name' must consist of {NAME_RULE}",
        )
    return TaskEntry(name, spec, file, where)


def _is_in_file(reference: str) -> bool:
    return "@" in reference or reference.endswith(".py")


def _check_replaced(kind: str, decorators: tuple[str, ...], spec: AnyTask, where: str) -> None:
    reference, args = getattr(spec, kind), getattr(spec, f"{kind}_args")
    if reference and _is_in_file(reference):
        _check_function(reference, decorators, args, f"{where}.{kind}", f"{where}.{kind}_args")
    elif args and not reference:
        raise InputError(f"{where}.{kind}_args: {args!r} is invalid without '{kind}'", "both, or neither")


def _check_function(
    reference: str, decorators: tuple[str, ...], args: Mapping[str, Any], where: str, where_args: str
) -> str:
    """Check that a file defines the function that `file.py@function` names, and its arguments; return its name."""
    file, _, function = reference.partition("@")
    kind = decorators[0]
    defined = _read_functions(Path(file), decorators, where)
    if not function and len(defined) == 1:
        function = next(iter(defined))
    if function not in defined:
        wanted = f"no {kind} '{function}'" if function else f"no single {kind}"
        raise InputError(
            f"{where}: {reference!r} is invalid: {file} has {wanted}{nearest(function, defined)}",
            ", ".join(f"{file}@{name}" for name in defined) or f"a file with a function decorated with @{kind}",
        )
    _check_arguments(defined[function], reference, args, where_args)
    return function


def _check_arguments(parameters: ast.arguments, reference: str, args: Mapping[str, Any], where: str) -> None:
    named = [*parameters.posonlyargs, *parameters.args]
    required = {parameter.arg for parameter in named[: len(named) - len(parameters.defaults)]}
    required |= {p.arg for p, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True) if not default}
    names = [parameter.arg for parameter in (*named, *parameters.kwonlyargs)]
    for argument in args:
        if argument not in names and not parameters.kwarg:
            raise InputError(
                f"{where}: '{argument}' is not an argument of {reference}{nearest(argument, names)}",
                ", ".join(names) or "no arguments",
            )
    if missing := sorted(required - args.keys()):
        raise InputError(f"{where}: {reference} needs {', '.join(missing)}, which have no default")


def _read_functions(path: Path, decorators: tuple[str, ...], where: str) -> dict[str, ast.arguments]:
    """Return the parameters of the functions that have one of the decorators, by the functions' names in Inspect."""
    if not path.is_file():
        raise InputError(
            f"{where}: no such file: {path}", f"file.py@{decorators[0]}, relative to the working directory"
        )
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise InputError(f"not Python: {error.msg}", file=f"{path}:{error.lineno}") from error
    except ValueError as error:
        raise InputError(f"not Python: {error}", file=path) from error
    functions = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                if _get_decorator(decorator) in decorators:
                    functions[_given_name(decorator) or node.name] = node.args
    return functions


def _given_name(decorator: ast.expr) -> str | None:
    """Return the name in `@task(name="...")`."""
    for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return None


def _get_decorator(decorator: ast.expr) -> str | None:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None
