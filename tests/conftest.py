"""What holds for all tests. Those that cannot run on this machine are counted, and the count is told."""

import os
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = len(terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(
            f"NOT RUN: {skipped} tests could not run on this machine; the reasons are above", red=True
        )
    if count := os.environ.get("LORASWEEP_NOT_RUN"):
        with Path(count).open("a") as file:
            file.write(f"{skipped}\n")
