"""What holds for all tests. Those that cannot run on this machine are counted, and the count is told."""

import os
import signal
from pathlib import Path

import pytest

# Tests run beside each other: a thread of torch's that waits for another should leave its core to them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_configure() -> None:
    # As Ctrl-C: what tests have started is ended by them.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(
            f"NOT RUN: {skipped} tests could not run on this machine; the reasons are above", red=True
        )
    if count := os.environ.get("LORASWEEP_NOT_RUN"):
        with Path(count).open("a") as file:
            file.write(f"{skipped}\n")
