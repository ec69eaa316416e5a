"""Tests that are interrupted leave no Snakemake behind, and none of its jobs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sweep import ROOT, wait_until

SNAKEFILE = """
rule all:
    output: "never"
    shell: "echo $$ > new && mv new job && exec sleep 100000"
"""

TEST = """
import os
from forked_snakemake import call_snakemake


def test_that_is_interrupted():
    call_snakemake(["--cores", "1"], os.environ["WHERE"], os.environ)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.long)]
)
def test_snakemake_and_its_jobs_end_with_the_tests_that_called_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    (tmp_path / "test_it.py").write_text(TEST)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "WHERE": str(tmp_path), "LORASWEEP_TESTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "conftest", "test_it.py"]
    tests = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        # As in a terminal; what a shell runs in its background ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: tests.poll() is not None or (tmp_path / "job").exists())
    started = psutil.Process(tests.pid).children(recursive=True)
    assert int((tmp_path / "job").read_text()) in [process.pid for process in started]
    assert len(started) >= 3  # what forks, Snakemake, and the job
    tests.send_signal(number)
    assert tests.wait() != 0
    wait_until(lambda: not any(process.is_running() for process in started))
