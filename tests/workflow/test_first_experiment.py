"""`lorasweep new`: what it writes plans as it stands, with the commands that it prints."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from sweep import Sweep


def test_the_written_experiment_plans_as_it_stands(make: Callable[..., Sweep]) -> None:
    sweep = make()
    (sweep.directory / "sweep.yaml").unlink()
    written = sweep.lorasweep("new", "--model", "model", "--data", "train.jsonl", "--task", "tasks.py@letters")
    assert written.returncode == 0, written.stderr
    dry_run, _, show = (shlex.split(line) for line in written.stdout.splitlines()[-3:])
    command = [sys.executable, "-m", *dry_run]
    planned = subprocess.run(command, cwd=sweep.directory, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "Plan: 0 of 4 points done." in planned.stdout + planned.stderr
    assert Path(show[-1]).name == "sweep.yaml"
    again = sweep.lorasweep("new", "--model", "model", "--data", "train.jsonl")
    assert again.returncode == 1
    assert again.stderr.startswith("sweep.yaml: is there already, and is not overwritten")
