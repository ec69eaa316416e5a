"""Python programs without the seconds that each takes to import: forked from a process that has imported it all.

Nothing has computed in that process, so forking is safe. Each program is a process with an environment and a directory
of its own, as if it was started anew. `PROCESSES.set_forkserver_preload` says what.
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")


def start(
    program: str | Path,
    arguments: Sequence[Any] = (),
    environment: Mapping[str, str] = os.environ,
    cwd: Path = Path(),
    output: str = os.devnull,
    errors: str = os.devnull,
    prepare: Callable[[], None] | None = None,
) -> Any:
    """Start a script, or a module by its name, after what prepares the process; return the process."""
    command = [str(program), *map(str, arguments)]
    begin = (command, dict(environment), str(cwd.absolute()), output, errors, prepare)
    process = PROCESSES.Process(target=_become, args=begin)
    process.start()
    return process


def call(program: str | Path, arguments: Sequence[Any] = (), **settings: Any) -> subprocess.CompletedProcess[str]:
    """Start a script or a module, and return what it printed and its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("output", "errors")]
        process = start(program, arguments, output=str(files[0]), errors=str(files[1]), **settings)
        process.join()
        said = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess([str(program), *arguments], process.exitcode, *said)


def _become(
    command: list[str],
    environment: dict[str, str],
    cwd: str,
    output: str,
    errors: str,
    prepare: Callable[[], None] | None,
) -> None:
    """Be the process that was asked for."""
    for file, descriptor in ((output, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # which what was imported may have asked for
    os.chdir(cwd)
    gc.freeze()  # what was imported is no garbage, and need not be looked through
    if prepare:
        prepare()
    sys.argv = command
    if command[0].endswith(".py"):
        runpy.run_path(command[0], run_name="__main__")
    else:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
