"""Stand in for the Python of an environment: do the same in a process that has imported all, and take a given time.

    python held_command.py serve FOLDER                      # as the environment's Python; forks at each call
    python held_command.py call FOLDER SECONDS PYTHON [ARGUMENTS]   # as if ARGUMENTS were given to that Python

So a job of a sweep costs a core next to nothing, and takes as long as it is told: many fit on a small machine, and what
else a sweep takes is seen. `FOLDER/times.jsonl` gets a line for each call with its times.
"""

import json
import os
import runpy
import socket
import sys
import time
from pathlib import Path

WORDS = ("train", "merge", "evaluate", "evaluate_adapters")
"""The jobs that take the given time."""

MODULES = ("torch", "transformers", "peft", "inspect_ai", "numpy", "pyarrow.parquet", "lorasweep.evaluation.evaluate")


def serve(folder: Path) -> None:
    """Fork at each call; end with the caller, which holds the standard input."""
    for module in (*MODULES, "lorasweep.adapters.merge", "lorasweep.trainers.processes"):
        __import__(module)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.listen(100)
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        if os.fork():
            connection.close()
            continue
        child = os.fork()
        if not child:
            _become(json.loads(connection.makefile().readline()))
        _, status = os.waitpid(child, 0)
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)


def _become(request: dict) -> None:
    for number in (1, 2):
        opened = os.open(request["outputs"][number - 1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(opened, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[0:0] = [part for part in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if part]
    status = 1
    try:
        sys.argv = request["arguments"][1:]
        runpy.run_module("lorasweep", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def call(folder: Path, seconds: float, python: str, arguments: list[str]) -> int:
    """Have the server do a job, and wait until the seconds are over; what is no such job is done by PYTHON at once."""
    word = arguments[3] if arguments[:3] == ["-m", "lorasweep", "job"] else ""
    if word not in WORDS:
        os.execv(python, [python, *arguments])
    began = time.time()
    outputs = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
    outputs = [path if path.startswith("/") else os.devnull for path in outputs]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "socket"))
        request = {"cwd": os.getcwd(), "environment": dict(os.environ), "arguments": arguments, "outputs": outputs}
        client.sendall((json.dumps(request) + "\n").encode())
        status = int(client.recv(100))
    if not status:
        time.sleep(max(0, began + seconds - time.time()))
        line = {"job": os.environ.get("SLURM_JOB_ID"), "word": word, "begun": began, "ended": time.time()}
        with (folder / "times.jsonl").open("a") as file:
            file.write(json.dumps(line | find_starts()) + "\n")
    return status


def find_starts() -> dict[str, float]:
    """Return when the first Snakemake of the job's step began, if one is the cause of this call."""
    boot = next(float(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if "btime" in line)
    starts, pid = {}, os.getpid()
    while pid > 1:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if {"snakemake_in_job.py", "snakemake"} & {Path(word).name for word in words[1:3]}:
            starts["snakemake"] = boot + int(fields[19]) / os.sysconf("SC_CLK_TCK")
        pid = int(fields[1])
    return starts


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(Path(sys.argv[2]))
    sys.exit(call(Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4], sys.argv[5:]))
