"""Where the clone lies, what it is called, and what a login shell sets, make no difference."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep import ROOT, Sweep

ODD_ENVIRONMENT = {
    "LANG": "C",
    "LC_ALL": "C",
    "TZ": "Pacific/Kiritimati",
    "SLURM_JOB_ID": "1",
    "SBATCH_PARTITION": "none",
    "SQUEUE_FORMAT": "%i",
    "SACCT_FORMAT": "User",
    "CONDA_PREFIX": "/none/conda",
    "VIRTUAL_ENV": "/none/venv",
    "OMP_NUM_THREADS": "1",
}


def call(sweep: Sweep, root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Plan the sweep with the workflow below `root`, as a process with other variables; `umask` is 077."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", root / "Snakefile", "--directory", sweep.directory]
    command += ["--configfile", sweep.directory / "sweep.yaml", "--dry-run", "--cores", "2"]
    return subprocess.run(
        list(map(str, command)), cwd=root, env=os.environ | variables, umask=0o077, capture_output=True, text=True
    )


def test_a_plan_and_a_mistake_read_alike_wherever_the_clone_lies(
    make: Callable[..., Sweep], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("elsewhere")
    link, temporary = folder / "a blank and ä letter/lorasweep", folder / "tmp with a blank"
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(ROOT)
    temporary.mkdir()
    home = folder / "home"
    home.mkdir()
    sweep = make()
    variables = {**ODD_ENVIRONMENT, "HOME": str(home), "TMPDIR": str(temporary)}
    planned = call(sweep, link, **variables)
    assert planned.returncode == 0, planned.stderr
    assert re.search(r"^train +2$", planned.stdout, flags=re.MULTILINE)
    assert not [path for path in home.rglob("*") if path.is_file()]
    sweep.edit(controls={"lora_rank": 0})
    refused = call(sweep, link, **variables)
    assert refused.returncode == 1
    told = [line for line in refused.stderr.splitlines() if not line.startswith(("Using workflow", "host:"))]
    expected = "sweep.yaml: controls.lora_rank: 0 is invalid. Expected: greater than or equal to 1"
    assert told == [f"{sweep.directory / expected}"]
