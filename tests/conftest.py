"""What holds for all tests: those that cannot run on this machine are counted, and how long each takes is noted."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's affair.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# Tests run beside each other: a thread of torch's that waits for another should leave its core to them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What scripts/run takes out of a job's environment, since torch reads it; and tests are no job of SLURM's themselves.
for name in ("SLURM_JOB_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)
# As for most users: what a job prints reaches its log when Python's buffer is full, and modules are compiled once.
for name in ("PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"):
    os.environ.pop(name, None)


DURATIONS: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    DURATIONS[report.nodeid] = DURATIONS.get(report.nodeid, 0) + report.duration


def pytest_configure() -> None:
    # As Ctrl-C: what tests have started is ended by them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(
            f"NOT RUN: {skipped} tests could not run on this machine; the reasons are above", red=True
        )
    # Of tests that several processes run, the one that hands them out tells.
    folder = None if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("LORASWEEP_TESTS")
    if folder:
        Path(folder).mkdir(exist_ok=True)  # `make test` has made it anew, a single target has not
        with Path(folder, "counts").open("a") as file:
            file.write(f"{len(DURATIONS) - skipped} {skipped}\n")
        with Path(folder, "durations").open("a") as file:
            file.writelines(f"{seconds:.1f} {test}\n" for test, seconds in DURATIONS.items())
