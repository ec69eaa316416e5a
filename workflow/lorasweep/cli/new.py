"""Write an experiment's file from a model, a file of samples and a task, with a comment on each key.

What no option gives is asked for, if this is a terminal. The file plans as it stands. No file is overwritten.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from lorasweep.experiment.loading import load_experiment, parse_section, read_config
from lorasweep.experiment.sections import About
from lorasweep.hub.references import find_references
from lorasweep.sweep.first_experiment import (
    FoundData,
    UnclearColumnsError,
    describe_experiment,
    find_data,
    find_device,
    find_model,
    find_task,
    make_name,
)
from lorasweep.sweep.sweep import RESULTS, Sweep
from lorasweep.util.errors import InputError, naming_key

_NONE = "none"
"""What is answered for no task."""

_Found = TypeVar("_Found")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the file to write, such as my.yaml")
    parser.add_argument("--model", help="a checkpoint directory, or org/name of a model on the hub")
    parser.add_argument("--data", help="a file of samples, or hf://datasets/org/name/FILE")
    parser.add_argument(
        "--columns", nargs=2, metavar=("QUESTION", "ANSWER"), default=[], help="its columns, if their names are unusual"
    )
    parser.add_argument(
        "--task", action="append", help="an Inspect task: file.py@task, or a registered name; can be repeated"
    )
    parser.add_argument("--name", help="the experiment's name (default: that of the file)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="where jobs run (default: cuda if a GPU is here)")


def run(arguments: argparse.Namespace) -> None:
    file: Path = arguments.file
    _check_file(file)
    is_terminal = sys.stdin.isatty()
    missing = [f"--{option}" for option in ("model", "data") if not getattr(arguments, option)]
    if missing and not is_terminal:
        raise InputError(
            f"{' and '.join(missing)}: not given, and there is no terminal to ask on",
            f"lorasweep new {file} --model DIRECTORY --data FILE [--task file.py@task] [--name NAME]",
        )
    try:
        _write(arguments, file, is_terminal)
    except (EOFError, KeyboardInterrupt) as error:
        raise InputError(f"{file}: not written, since not all was answered") from error


def _write(arguments: argparse.Namespace, file: Path, is_terminal: bool) -> None:
    model = _get(
        "--model", arguments.model, "Model: a checkpoint directory, or org/name on the hub", find_model, _MODELS
    )
    print(*model.notes, sep="\n")
    data = _get(
        "--data",
        arguments.data,
        "Training data: a file of samples, or hf://datasets/org/name/FILE",
        lambda value: _find_data(value, arguments.columns, is_terminal),
        _SAMPLES,
    )
    print(*data.notes, sep="\n")
    tasks = [_get("--task", task, "", find_task, ()) for task in arguments.task or []]
    if arguments.task is None and is_terminal:
        question = "Task to evaluate with: file.py@task, or a registered name"
        while (task := _ask(question, _NONE, lambda value: value if value == _NONE else find_task(value))) != _NONE:
            tasks.append(task)
            question = "Another task"
    for task in tasks:
        if ".py" not in task:
            print(f"{task}: the name of a registered task, which a dry run looks up.")
    name = arguments.name or make_name(file)
    if not arguments.name and is_terminal:
        name = _ask("Name of the experiment", name, _check_name)
    with naming_key("--name"):
        _check_name(name)
    device = arguments.device or find_device()
    if not arguments.device and device == "cpu":
        slurm = "; for SLURM's nodes with GPUs: --device cuda" if shutil.which("sbatch") else ""
        print(f"No NVIDIA GPU on this machine: device: cpu, dtype: fp32{slurm}.")
    if (RESULTS / name).exists():
        print(f"{RESULTS / name}: is there already, and this experiment would go on with it; --name gives another.")
    with file.open("x", encoding="utf-8") as written:
        written.write(describe_experiment(name, model, data, tasks, device))
    print(f"Wrote {file}.\n")
    _check(file)


def _check(file: Path) -> None:
    """Check the written experiment as a run does; print what comes next."""
    source = str(file)
    config = read_config(file)
    try:
        experiment = load_experiment(config, source)
        references = find_references(experiment)
        if not references:
            Sweep.load(config, source).check(asks_inspect=False)
    except InputError as error:
        raise InputError(f"{file} is written, but does not plan yet:\n{error}") from error
    name = shlex.quote(source)
    snakemake = "snakemake" if Path("Snakefile").exists() else f"snakemake --snakefile {shlex.quote(str(_SNAKEFILE))}"
    if references:
        print(f"First, to fetch {', '.join(sorted({str(ref) for ref in references.values()}))}:")
        print(f"  lorasweep download {name}")
    print("Next: see what would run; run it, here (--cores) or on SLURM (--profile slurm); see the answer:")
    print(f"  {snakemake} --configfile {name} -n")
    is_for_slurm = shutil.which("sbatch") and experiment.model.device == "cuda"
    where = "--profile slurm" if is_for_slurm else f"--cores {os.cpu_count() or 1}"
    print(f"  {snakemake} --configfile {name} {where}")
    print(f"  lorasweep show {name}")


_SNAKEFILE = Path(__file__).parents[3] / "Snakefile"


def _check_file(file: Path) -> None:
    if file.exists() or file.is_symlink():
        raise InputError(f"{file}: is there already, and is not overwritten", "the name of a new file")
    if not file.parent.is_dir():
        raise InputError(f"{file}: no such directory: {file.parent}", "a file in a directory that exists")
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{file}: is no name of a YAML file", f"{file.with_suffix('.yaml')}")


def _check_name(name: str) -> str:
    return parse_section(About, {"name": name}).name


def _find_data(file: str, columns: list[str], is_terminal: bool) -> FoundData:
    try:
        return find_data(file, columns)
    except UnclearColumnsError as error:
        if not is_terminal or len(error.columns) < 2:
            raise
        known = error.columns

    def choose(column: str) -> str:
        if column not in known:
            raise InputError(f"{column!r} is no column of text", ", ".join(known))
        return column

    print(f"{file}: columns of text: {', '.join(known)}")
    question = _ask("Column of the user's turn", known[0], choose)
    answer = _ask("Column of the answer to learn", next(name for name in known if name != question), choose)
    return find_data(file, [question, answer])


_MODELS = ("*/config.json", "*/*/config.json")
_SAMPLES = ("*.jsonl", "data/*.jsonl", "*/train.jsonl", "data/*.parquet", "data/*.csv")
"""Where a likely model, and likely samples, are looked for; the first is offered."""


def _get(option: str, value: str | None, question: str, find: Callable[[str], _Found], likely: Iterable[str]) -> _Found:
    """Return what is found for the value of an option, or else for an answer."""
    if value is not None:
        with naming_key(option):
            return find(value)
    found = next((file for pattern in likely for file in sorted(Path().glob(pattern)) if _is_likely(file)), None)
    return _ask(question, str(found.parent if found and option == "--model" else found or ""), find)


def _is_likely(file: Path) -> bool:
    return not file.parts[0].startswith(".") and file.parts[0] != str(RESULTS)


def _ask(question: str, default: str, find: Callable[[str], _Found]) -> _Found:
    """Ask until the answer is right; an empty answer is the default, which stands in brackets."""
    while True:
        answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        if not answer:
            continue
        try:
            return find(answer)
        except InputError as error:
            print(error)
