"""Snakemake without the seconds that each start of it takes: a process that has imported it, and forks at each call.

Each call has a process, a directory and an environment of its own, as if it was started anew, and ends as Python does.
Imported, this gives `call_snakemake`; started, it is the process that forks.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def call_snakemake(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Call Snakemake with arguments; return what it printed and its exit status."""
    server = _start_server()
    assert server.stdin
    assert server.stdout
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        request = [list(arguments), str(cwd), dict(environment), str(output), str(errors)]
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(), errors.read_text())


@cache
def _start_server() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(server.wait)
    assert server.stdin
    atexit.register(server.stdin.close)  # called before the wait, which it ends
    return server


def _serve() -> None:
    for module in ("lorasweep.forecast", "lorasweep.inputs", "snakemake_executor_plugin_slurm", "snakemake.report"):
        import_module(module)
    import snakemake.cli

    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(snakemake.cli.main, *json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(main: Any, arguments: list[str], cwd: str, environment: dict[str, str], output: str, errors: str) -> None:
    """Be the process that was asked for; does not return."""
    for file, descriptor in ((os.devnull, 0), (output, 1), (errors, 2)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.argv = ["snakemake", *arguments]
    main()


if __name__ == "__main__":
    _serve()
