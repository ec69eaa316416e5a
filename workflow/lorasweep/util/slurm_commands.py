"""SLURM's commands, run again while SLURM does not answer. A job is submitted once, and two jobs never share an output.

`scripts/slurm` has a link to `command` for each of SLURM's commands. A run puts that folder first on the path of its
process and of its jobs, so that all who call SLURM, the executor plugin too, call this program:

    python slurm_commands.py squeue --me        # a command of SLURM with its arguments
    python slurm_commands.py turn KEY MARK COMMAND   # a job's shell command, when no other job works on the same output

It is started for each command, and so imports the standard library alone.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

FOLDER = "LORASWEEP_SLURM"
"""Environment variable with the folder of a run's records of its jobs and of outages."""

PATIENCE = "LORASWEEP_PATIENCE"
"""Environment variable with the seconds for which an outage is waited out."""

RUN = "LORASWEEP_RUN"
"""Environment variable with the process id of the `snakemake` that submits a run's jobs."""

CLOSED = "closed"
"""File, in a run's folder, that says that the run submits no more jobs."""

A_DAY = 86400.0

LIMITS = {
    # SLURM's src/slurmctld/acct_policy.c
    r"(Assoc|QOS)\w*SubmitJobs?\w*Limit": "MaxSubmitJobs or GrpSubmitJobs of the association or QOS",
    # src/sbatch/sbatch.c, which itself waits for minutes at most
    r"Slurm job queue full|MaxJobCount limit reached|Job limit reached": "MaxJobCount (ESLURM_MAX_JOB_COUNT)",
}
"""What `sbatch` prints if a job is one too many until others end, as patterns; each with its source."""

OUTAGES = {
    # src/common/slurm_errno.c
    r"Unable to contact slurm controller": "slurmctld is down, or its machine is (SLURMCTLD_COMMUNICATIONS_*_ERROR)",
    r"Socket timed out on send/recv operation": "slurmctld is too busy (SLURM_PROTOCOL_SOCKET_IMPL_TIMEOUT)",
    r"Zero Bytes were transmitted or received": "the connection was closed (SLURM_PROTOCOL_SOCKET_ZERO_BYTES_SENT)",
    r"Connection timed out (establishing|writing|reading)": "SLURM_COMMUNICATIONS_TIMED_OUT_*",
    r"Communication (connection|shutdown|send|receive) failure": "SLURM_COMMUNICATIONS_*_ERROR",
    r"in standby mode": "the backup has not taken over yet (ESLURM_IN_STANDBY_MODE)",
    r"Rate limit exceeded, please retry": "too many requests (SLURMCTLD_RATE_LIMIT_*)",
    r"try again later": "the job is changing its state (ESLURM_TRANSITION_STATE_NO_UPDATE)",
    r"Requested nodes are busy": "ESLURM_NODES_BUSY",
    r"Required partition not available": "the partition is inactive or drained (ESLURM_PARTITION_NOT_AVAIL)",
    r"Unable to connect to database": "slurmdbd is away (ESLURM_DB_CONNECTION)",
    # src/common/slurm_persist_conn.c, src/plugins/accounting_storage/slurmdbd
    r"[Pp]roblem talking to the database": "slurmdbd is away",
    r"failed to open persistent connection": "slurmdbd is away",
    r"Sending PersistInit msg": "slurmdbd is away",
    # src/sbatch/sbatch.c and src/srun/allocate.c, which themselves wait for minutes at most
    r"controller not responding": "EAGAIN",
    r"temporarily (unable to accept|disabled)": "EAGAIN, ESLURM_NODES_BUSY, ESLURM_PORTS_BUSY",
    # errno(3)
    r"Connection refused": "ECONNREFUSED: a daemon is being started",
    r"Connection reset by peer": "ECONNRESET",
    r"Connection timed out": "ETIMEDOUT",
    r"No route to host|Network is unreachable": "EHOSTUNREACH, ENETUNREACH",
    r"Transport endpoint is not connected": "ENOTCONN",
    r"Resource temporarily unavailable": "EAGAIN",
    # getaddrinfo(3): the name service is away
    r"Temporary failure in name resolution": "EAI_AGAIN",
}
"""What SLURM's commands print if they have no answer, or another refusal that passes; as above."""


def _join(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


_LIMIT, _OUTAGE = _join(LIMITS), _join([*LIMITS, *OUTAGES])
_NO_STEP = re.compile(r"srun: error: (?:Unable to (?:create step|confirm allocation|allocate resources)|.*contact)")
"""What `srun` prints if it has not started its program."""

_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_PAUSE_AT_LIMIT = 5.0, 60.0, 10.0

SECONDS_BETWEEN_QUERIES = 5.5
"""Minimum time between two calls of `squeue` by a run, whoever calls: five, and what a program takes to start."""

MARKS = "ended"
"""Folder, in a run's folder, of the marks that jobs leave as they end: empty files `<job>.<state>`."""
_SETTLING = 10.0
"""Seconds that SLURM has to queue a job whose submission it did not answer."""

_BEAT, _DEAD = 15.0, 180.0
"""Seconds between the signs of life of a job, and without one until it counts as dead."""

_LAST_LINES = 20

_IDENTITY = {
    *("SLURM_JOB_ID", "SLURM_JOBID", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR", "SLURM_SUBMIT_HOST"),
    *(f"SLURM_ARRAY_{part}" for part in ("JOB_ID", "TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_STEP")),
}
"""SLURM's variables that say which job it is; its others are taken for options of `srun`."""

ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
"""SLURM's states of jobs that have ended."""


def find_outage(text: str) -> str:
    """Return the line that tells that SLURM did not answer, or refused what it will accept later; "" if none does."""
    return next((line.strip() for line in reversed(text.splitlines()) if _OUTAGE.search(line)), "")


def is_limit_reached(reason: str) -> bool:
    """Whether a line says that a job is one too many: it is not queued, and is taken when others have ended."""
    return _LIMIT.search(reason) is not None


class Outage:
    """The wait for SLURM's answer to one command. While it lasts, a file in the run's folder tells of it."""

    def __init__(
        self,
        name: str,
        tell: Callable[[str], object] | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """`tell` is called with a line at the first try without an answer, and ever more seldom later.

        `is_over` returns whether nobody needs the answer any more. It is asked every second.
        """
        self._name = name
        self._is_over = is_over
        self._tell = tell
        self._patience = float(os.environ.get(PATIENCE, A_DAY))
        self._began = time.monotonic()
        self._since = time.time()
        self._pause = _FIRST_PAUSE
        self._tries = 0
        folder = os.environ.get(FOLDER)
        self._file = Path(folder, "outages", f"{socket.gethostname()}-{os.getpid()}.json") if folder else None

    def wait(self, reason: str) -> bool:
        """Wait before the next try; return whether there is one."""
        self._tries += 1
        if is_limit_reached(reason):
            self._began = time.monotonic()  # an answer; the jobs that it tells of may run for days
        if time.monotonic() - self._began + self._pause > self._patience:
            return False
        record = {"command": self._name, "since": self._since, "tries": self._tries, "reason": reason}
        record |= {"host": socket.gethostname(), "pid": os.getpid()}
        if self._file:
            with contextlib.suppress(OSError):
                _write(self._file, record)
        if self._tell and self._tries & (self._tries - 1) == 0:
            self._tell(describe_outage(record))
        waited = time.monotonic() + self._pause
        while (left := waited - time.monotonic()) > 0 and not self._is_over():
            time.sleep(min(left, 1.0))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_AT_LIMIT if is_limit_reached(reason) else _LONGEST_PAUSE)
        return not self._is_over()

    def end(self) -> None:
        if self._file:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)


def describe_outage(record: dict[str, Any]) -> str:
    """Return a line that says since when SLURM does not answer or takes no job, how often it was asked, and why."""
    since = datetime.fromtimestamp(record["since"]).isoformat(sep=" ", timespec="seconds")
    what = "taken no further job" if is_limit_reached(record["reason"]) else f"not answered {record['command']}"
    return (
        f"SLURM has {what} since {since}, asked {record['tries']} times: {record['reason']}. "
        "It is asked again, and no job counts as failed meanwhile."
    )


def is_run_over() -> bool:
    """Whether the run that submits a job has ended, however it did, or is ending: nobody would wait for the job."""
    if process := os.environ.get(RUN):
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
    folder = os.environ.get(FOLDER)
    return folder is not None and Path(folder, CLOSED).exists()


def ask(
    name: str,
    *arguments: str,
    tell: Callable[[str], object] | None = None,
    is_over: Callable[[], bool] = lambda: False,
) -> subprocess.CompletedProcess[bytes]:
    """Run a command of SLURM until it is answered, or until patience ends; for the others, see `Outage`."""
    command = [find_command(name), *arguments]
    outage = Outage(name, tell, is_over)
    try:
        while True:
            if name == "squeue":
                _wait_between_queries()
            done = subprocess.run(command, capture_output=True)
            reason = find_outage(done.stderr.decode(errors="replace")) if done.returncode else ""
            if not reason or not outage.wait(reason):
                return done
    finally:
        outage.end()


def _wait_between_queries() -> None:
    """Wait until some seconds after the last `squeue` of this run, by whatever process and thread of its machine."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    with (
        contextlib.suppress(OSError, ValueError),
        Path(folder, f".queried-{socket.gethostname()}").open("a+", encoding="ascii") as file,
    ):
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        left = float(file.read() or 0) + SECONDS_BETWEEN_QUERIES - time.time()
        if 0 < left <= SECONDS_BETWEEN_QUERIES:  # else the clock was set
            time.sleep(left)
        file.truncate(0)
        file.write(str(time.time()))


def find_command(name: str) -> str:
    """Return the path of SLURM's own command.

    Raises:
        FileNotFoundError: there is none.
    """
    own = os.path.realpath(Path(__file__).parents[3] / "scripts/slurm")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    path = os.pathsep.join(folder for folder in folders if os.path.realpath(folder) != own)
    found = shutil.which(name, path=path)
    if found is None:
        raise FileNotFoundError(name)
    return found


def submit(arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run `sbatch` so that the job is queued once, whether it is answered or not.

    The job's comment gets a mark of this submission. If `sbatch` has no answer, `squeue` is asked for a job with the
    mark. The job waits for its turn if the comment says a rule: see `turn`. A run that is over submits no job.
    """
    mark = uuid.uuid4().hex[:12]
    arguments, name, comment = _mark(list(arguments), mark)
    if comment is None:  # not a job of a run
        return ask("sbatch", *arguments)
    arguments, script = _wrap(arguments, re.sub(r"[^\w.,=+-]", "_", comment), mark)
    command = [find_command("sbatch"), *arguments]
    outage = Outage("sbatch", is_over=is_run_over)
    try:
        while not is_run_over():
            done = subprocess.run(command, capture_output=True, input=script)
            reason = find_outage(done.stderr.decode(errors="replace")) if done.returncode else ""
            if done.returncode == 0:
                _note_job(done.stdout.decode(errors="replace"))
            if not reason or not outage.wait(reason):
                return done
            if is_limit_reached(reason):
                continue
            # SLURM may have read a request to which the answer was lost, and may get to it only now.
            for _ in range(2):
                if job := _find_submitted(name, mark):
                    _note_job(job)
                    # Without its errors: the plugin takes their words for a failure, whatever the exit status.
                    return subprocess.CompletedProcess(command, 0, f"{job}\n".encode(), b"")
                time.sleep(_SETTLING)
        return subprocess.CompletedProcess(command, 1, b"", b"sbatch: the run is over, and submits no more jobs\n")
    finally:
        outage.end()


def _mark(arguments: list[str], mark: str) -> tuple[list[str], str, str | None]:
    """Return arguments of `sbatch` with a mark in the comment, the job's name, and the comment as it was."""
    name, comment = "", None
    for index, argument in enumerate(arguments):
        if argument == "--job-name":
            name = arguments[index + 1]
        elif argument == "--comment":
            comment = arguments[index + 1]
            arguments[index + 1] = f"{comment} {mark}"
    return arguments, name, comment


def _wrap(arguments: list[str], key: str, mark: str) -> tuple[list[str], bytes | None]:
    """Have a job's command or script wait for its turn; return the arguments and the script."""

    def make_turn(command: str) -> str:
        return "exec " + shlex.join([sys.executable, "-S", os.path.abspath(__file__), "turn", key, mark, command])

    script = sys.stdin.buffer.read() if arguments[-1:] == ["/dev/stdin"] else None
    if script is not None:
        return arguments, f"#!/bin/sh\n{make_turn(script.decode())}\n".encode()
    wrap = "--wrap="
    turns = [wrap + make_turn(part.removeprefix(wrap)) if part.startswith(wrap) else part for part in arguments]
    return turns, None


def _find_submitted(name: str, mark: str) -> str:
    queue = ["--noheader", "--states=all", f"--name={name}", "--format=%i|%k"]
    done = ask("squeue", *queue, is_over=is_run_over)
    lines = done.stdout.decode(errors="replace").splitlines()
    jobs = [line.partition("|")[0].strip() for line in lines if line.rstrip().endswith(mark)]
    return jobs[0] if jobs else ""


def _note_job(text: str) -> None:
    """Note that a job was submitted, so that it is missed if SLURM forgets it."""
    folder, job = os.environ.get(FOLDER), re.search(r"^\d+", text, re.MULTILINE)
    if folder and job:
        with contextlib.suppress(OSError):
            file = Path(folder, "jobs", f"{job[0]}.json")
            if not file.exists():  # the job itself may have begun
                _write(file, {"state": "SUBMITTED"})


def run_step(arguments: Sequence[str]) -> int:
    """Run `srun`, again if it could not start its program because SLURM did not answer."""
    command = [find_command("srun"), *arguments]
    outage = Outage("srun")
    try:
        while True:
            status, lines = _run_and_pass_errors_on(command)
            text = "\n".join(lines)
            reason = find_outage(text) if status and _NO_STEP.search(text) else ""
            if not reason or not outage.wait(reason):
                return status
    finally:
        outage.end()


def _run_and_pass_errors_on(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a command, and write its errors as they come; return its exit status and the last lines of its errors."""
    _outlive_signals()
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    lines: list[str] = []
    assert process.stderr
    for line in process.stderr:
        sys.stderr.buffer.write(line)
        sys.stderr.flush()
        lines = [*lines[1 - _LAST_LINES :], line.decode(errors="replace").rstrip()]
    status = process.wait()
    return status if status >= 0 else 128 - status, lines


def _outlive_signals() -> None:
    """Have this process wait for its child, which SLURM signals too: it signals all processes of a job or a step."""

    def go_on(_number: int, _frame: object) -> None:
        pass

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, go_on)  # not SIG_IGN, which the child would inherit


def turn(key: str, mark: str, command: str) -> int:
    """Run a job's shell command when no other job works on the same output; return its exit status.

    A job of a submission that another job has done already ends at once.

    The lock is a file with the job's id, its host, and a number that grows as long as the job lives. The job that waits
    counts the seconds without a new number by its own clock, so that clocks need not agree. It asks SLURM too, which
    knows of a job's end earlier. If the job before it ended well, the work is done, and it ends as well.
    """
    folder, job = Path(os.environ[FOLDER]), os.environ["SLURM_JOB_ID"]
    own = folder / "jobs" / f"{job}.json"
    lock, done = folder / "turns" / key, folder / "done" / mark
    _write(own, {"state": "WAITING"})
    remove_end_marks(folder, job)  # of before SLURM queued this job again
    if _wait_for_turn(lock, job, folder) or done.exists():
        _write(own, {"state": "COMPLETED"})
        _release(lock, job)
        _leave_end_mark(folder, job, "COMPLETED")
        return 0
    _outlive_signals()
    process = subprocess.Popen(["/bin/sh", "-c", command], env=get_step_environment())
    ended = threading.Event()
    threading.Thread(target=_beat, args=(lock, job, ended), daemon=True).start()
    status = process.wait()
    ended.set()
    state = "COMPLETED" if status == 0 else "FAILED"
    with contextlib.suppress(OSError):
        _write(own, {"state": state})
        if status == 0:
            _write(done, {"job": job})
    _release(lock, job)
    _leave_end_mark(folder, job, state)
    return status if status >= 0 else 128 - status


def get_end_mark(folder: Path, job: str, state: str) -> Path:
    """Return the mark by which a job says that it ends, and how: `COMPLETED` or `FAILED`."""
    return folder / MARKS / f"{job}.{state}"


def remove_end_marks(folder: Path, job: str) -> None:
    """Remove the marks that a job has left, if any."""
    for state in ("COMPLETED", "FAILED"):
        with contextlib.suppress(OSError):
            get_end_mark(folder, job, state).unlink()


def _leave_end_mark(folder: Path, job: str, state: str) -> None:
    # Last, and empty, so that it is there as a whole. Without it, SLURM is asked.
    with contextlib.suppress(OSError):
        file = get_end_mark(folder, job, state)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def get_step_environment() -> dict[str, str]:
    """Return the environment of a job's step: the options of `srun` are those of its call, not the allocation's."""

    def is_option(name: str) -> bool:
        return name.startswith(("SRUN_", "SBATCH_")) or (name.startswith("SLURM_") and name not in _IDENTITY)

    return {name: value for name, value in os.environ.items() if not is_option(name)}


def _release(lock: Path, job: str) -> None:
    with contextlib.suppress(OSError):
        if _read(lock).get("job") == job:
            lock.unlink()


def _wait_for_turn(lock: Path, job: str, folder: Path) -> bool:
    """Take a lock; return whether the job that had it before did the work."""
    last: tuple[str, int] | None = None
    seen = time.monotonic()
    is_told = False
    has_ended: bool | None = None
    asks, pause = seen, _FIRST_PAUSE
    while True:
        mine = lock.with_name(f".{lock.name}.{job}")
        _sign(mine, job, 0)
        try:
            os.link(mine, lock)  # atomic on shared file systems too
            return last is not None and _read(folder / "jobs" / f"{last[0]}.json").get("state") == "COMPLETED"
        except FileExistsError:
            pass
        finally:
            mine.unlink(missing_ok=True)
        holder = _read(lock)
        if not holder:  # just released
            continue
        is_of_this_cluster = holder.get("cluster") == _get_cluster()
        if holder["job"] == job and is_of_this_cluster:  # SLURM has queued this job again
            _sign(lock, job, 0)
            return False
        if last and holder["job"] != last[0]:
            asks, pause = time.monotonic(), _FIRST_PAUSE
        if (holder["job"], holder["beat"]) != last:
            last, seen = (holder["job"], holder["beat"]), time.monotonic()
        if not is_told:
            print(f"SLURM job {holder['job']} on {holder['host']} works on the same: waiting for its end", flush=True)
            is_told = True
        if time.monotonic() >= asks:
            has_ended = _has_ended(holder["job"]) if is_of_this_cluster else None
            asks, pause = time.monotonic() + pause, min(2 * pause, _LONGEST_PAUSE)
        if has_ended or (has_ended is None and time.monotonic() - seen > _DEAD):
            _break(lock, last)
        else:
            time.sleep(5)


def _break(lock: Path, last: tuple[str, int]) -> None:
    """Remove the lock of a job that is dead, unless another job has taken it meanwhile."""
    aside = lock.with_name(f".{lock.name}.{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        lock.rename(aside)
        holder = _read(aside)
        if (holder.get("job"), holder.get("beat")) != last:
            with contextlib.suppress(FileExistsError):
                os.link(aside, lock)
        aside.unlink()


def _has_ended(job: str) -> bool | None:
    """Whether SLURM says that a job has ended; `None` if it does not answer."""
    try:
        done = subprocess.run(
            [find_command("squeue"), "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            timeout=30,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return True if b"Invalid job id" in done.stderr else None
    states = done.stdout.decode().split()
    return not states or all(state in ENDED for state in states)


def _beat(lock: Path, job: str, ended: threading.Event) -> None:
    """Give signs of life in a lock until the work has ended."""
    number = 0
    while not ended.wait(_BEAT):
        number += 1
        with contextlib.suppress(OSError):
            if _read(lock).get("job") == job:
                _sign(lock, job, number)


def _sign(lock: Path, job: str, beat: int) -> None:
    """Write that a job holds a lock, with its last sign of life."""
    _write(lock, {"job": job, "cluster": _get_cluster(), "host": socket.gethostname(), "beat": beat})


def _get_cluster() -> str | None:
    """Return the cluster that this job is on: another one, for which the same folder was used, has the same ids."""
    return os.environ.get("SLURM_CLUSTER_NAME")


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    aside.write_text(json.dumps(content), encoding="utf-8")
    aside.replace(file)


def main(name: str, *arguments: str) -> int:
    """Run a command of SLURM, or a job's command in its turn; return the exit status."""
    if name == "turn":
        return turn(*arguments)
    try:
        if name == "srun":
            return run_step(arguments)
        done = submit(arguments) if name == "sbatch" else ask(name, *arguments)
    except FileNotFoundError:
        print(f"{name}: command not found", file=sys.stderr)
        return 127
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
