"""Inspect tasks as the experiment names them, checked without importing Inspect or running any of their code."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from lorasweep.errors import InputError, nearest
from lorasweep.experiment import NAME_PATTERN, NAME_RULE, Task


@dataclass(frozen=True)
class TaskEntry:
    """A task of the experiment with the name of its log."""

    name: str
    spec: Task
    file: Path | None
    """The file that defines it; `None` for a task that an installed package registers."""


def get_tasks(tasks: list[Task], source: str) -> list[TaskEntry]:
    """Check the tasks and give each its name.

    Raises:
        InputError: a missing file, a file without that task, an argument that the task does not take, two tasks of
            one name.
    """
    entries: list[TaskEntry] = []
    for index, spec in enumerate(tasks):
        where = f"{source}: evaluation.tasks.{index}"
        file, _, function = spec.task.partition("@")
        if not function and not file.endswith(".py"):
            entries.append(_named(spec, spec.task.rpartition("/")[2], None, where))
            continue
        path = Path(file)
        defined = _read_tasks(path, where)
        if not function and len(defined) == 1:
            function = next(iter(defined))
        if function not in defined:
            wanted = f"no task '{function}'" if function else "no single task"
            raise InputError(
                f"{where}: {spec.task!r} is not accepted: {path} has {wanted}{nearest(function, defined)}; accepted: "
                + (", ".join(f"{file}@{name}" for name in defined) or "a file with a function under @task")
            )
        _check_arguments(defined[function], spec, where)
        for index_of_file, name in enumerate(spec.files):
            if not Path(name).is_file():
                raise InputError(f"{where}.files.{index_of_file}: no such file: {name}")
        entries.append(_named(spec, function, path, where))
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{source}: evaluation.tasks: two tasks are called '{name}'; give one of them a 'name'")
    return entries


def _named(spec: Task, default: str, file: Path | None, where: str) -> TaskEntry:
    name = spec.name or default
    if not re.fullmatch(NAME_PATTERN, name) or ".." in name:
        raise InputError(
            f"{where}: {spec.task!r} is not accepted; accepted: file.py@task, or a registered name; "
            f"its 'name' must be of {NAME_RULE}"
        )
    return TaskEntry(name, spec, file)


def _check_arguments(parameters: ast.arguments, spec: Task, where: str) -> None:
    named = [*parameters.posonlyargs, *parameters.args]
    required = {parameter.arg for parameter in named[: len(named) - len(parameters.defaults)]}
    required |= {p.arg for p, default in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True) if not default}
    known = [parameter.arg for parameter in (*named, *parameters.kwonlyargs)]
    for argument in spec.args:
        if argument not in known and not parameters.kwarg:
            raise InputError(
                f"{where}.args: '{argument}' is no argument of {spec.task}{nearest(argument, known)}; "
                f"accepted: {', '.join(known) or 'none'}"
            )
    if missing := sorted(required - spec.args.keys()):
        raise InputError(f"{where}.args: {spec.task} needs {', '.join(missing)}, for which there is no default")


def _read_tasks(path: Path, where: str) -> dict[str, ast.arguments]:
    """Return the parameters of the functions under Inspect's `@task`, by the names under which Inspect knows them."""
    if not path.is_file():
        raise InputError(f"{where}: no such file: {path}; accepted: file.py@task, relative to the working directory")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno}: not Python: {error.msg}") from error
    except ValueError as error:
        raise InputError(f"{path}: not Python: {error}") from error
    tasks = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            for decorator in filter(_is_task, node.decorator_list):
                tasks[_given_name(decorator) or node.name] = node.args
    return tasks


def _given_name(decorator: ast.expr) -> str | None:
    """The name in `@task(name="...")`."""
    for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
        if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
            return str(keyword.value.value)
    return None


def _is_task(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return (isinstance(function, ast.Name) and function.id == "task") or (
        isinstance(function, ast.Attribute) and function.attr == "task"
    )
