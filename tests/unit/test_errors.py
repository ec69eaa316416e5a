"""A failure's reason: whole, with its causes, and found again in what a process printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep.util.errors import InputError, JobError, call_to_the_end, describe, find_reason


def fail(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\n  two"), "ValueError: one\n  two"),
        (KeyError("a key"), "KeyError: 'a key'"),
        (InputError("lr: 0 is invalid", "more"), "lr: 0 is invalid. Expected: more"),
        (JobError("it diverged"), "it diverged"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "[Errno 2] No such file or directory: 'x.json'"),
        (OSError(), "OSError"),
        (fail(RuntimeError("no data"), ValueError("line 3")), "RuntimeError: no data\ncaused by ValueError: line 3"),
        (fail(RuntimeError("bad: ValueError: line 3"), ValueError("line 3")), "RuntimeError: bad: ValueError: line 3"),
        (ValueError("[bold][blue]x[/blue][/bold] is [1]"), "ValueError: x is [1]"),
    ],
)
def test_an_exception_is_described_whole_with_its_causes(error: Exception, said: str) -> None:
    assert describe(error) == said


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ValueError('one\\n  two')", "train: ValueError: one\n  two"),
        ("JobError('it diverged:\\nstep 2')", "train: it diverged:\nstep 2"),
        ("OSError(28, 'No space left on device')", "train: [Errno 28] No space left on device"),
    ],
)
def test_the_reason_of_a_jobs_failure_is_found_whole_in_its_log(tmp_path: Path, error: str, reason: str) -> None:
    log = tmp_path / "train.log"
    program = (
        "from lorasweep.util.errors import JobError, call_to_the_end\n"
        f"def fail():\n    print('half way')\n    raise {error}\n"
        "call_to_the_end(fail, 'train: ')"
    )
    # As a job: what it prints goes to the file of its log, too, when Python's buffer is full or the process ends.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with log.open("w") as file:
        done = subprocess.run([sys.executable, "-c", program], stdout=file, stderr=file, env=environment, check=False)
    assert done.returncode == 1
    assert find_reason(log.read_text().splitlines()) == reason
    assert ("Traceback" in log.read_text()) == ("ValueError" in error)


def test_what_prints_no_reason_has_none() -> None:
    assert find_reason(["half way", ""]) == ""
    assert find_reason([]) == ""


def test_a_command_of_the_users_says_its_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise InputError("no such file", "a file")

    with pytest.raises(SystemExit, match=r"^no such file\. Expected: a file$"):
        call_to_the_end(fail)
