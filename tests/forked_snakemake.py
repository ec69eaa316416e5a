"""Snakemake without the seconds that each start of it takes: a process that has imported it, and forks at each call.

Each call has a process, a session, a directory and an environment of its own, as if it was started anew, and ends as
Python does. It does not outlive who called: when the pipe to the process that forks is closed, by whatever ended the
caller, Snakemake and its jobs are killed.
Imported, this gives `call_snakemake`; started, it is the process that forks.
"""

import atexit
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
        except BaseException:  # Ctrl-C too: what was called ends, and what is called next starts another
            _start_server.cache_clear()
            server.stdin.close()
            server.wait()
            raise
        return subprocess.CompletedProcess(list(arguments), status, output.read_text(), errors.read_text())


@cache
def _start_server() -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "workflow")}
    # In a session of its own: Ctrl-C reaches the caller alone, at whose end it ends what it forked.
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=pipe, stdout=pipe, text=True, env=environment, start_new_session=True
    )
    atexit.register(server.wait)
    assert server.stdin
    atexit.register(server.stdin.close)  # called before the wait, which it ends
    return server


def _serve() -> None:
    for module in ("lorasweep.running.run", "pyarrow.parquet", "smart_open"):
        import_module(module)
    import snakemake.cli

    snakemake.cli.get_argument_parser()  # which imports every plugin
    gc.freeze()
    sys.path.remove(str(Path(__file__).parent))
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.setsid()
            _become(snakemake.cli.main, *json.loads(line))
        if _outlives_the_caller(child):
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with suppress(BrokenPipeError):
            print(os.waitstatus_to_exitcode(status), flush=True)


def _outlives_the_caller(child: int) -> bool:
    """Wait for the end of a child or of the caller; return whether it was the caller's."""
    descriptor = os.pidfd_open(child)
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    waiting.register(sys.stdin.fileno(), 0)  # its hang-up alone
    ended = {found for found, _ in waiting.poll()}
    os.close(descriptor)
    return descriptor not in ended


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
