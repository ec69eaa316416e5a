"""A finished sweep of a tiny model, made once by real jobs, that tests look at and plan changes of."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
EVAL_PYTHON = ROOT / ".venv/eval/bin/python"
TRAIN_PYTHON = ROOT / ".venv/train/bin/python"

TASKS = '''
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def letters(size: int = 6) -> Task:
    """The letter that follows."""
    samples = [Sample(input=f"after {a}", target=b) for a, b in zip("abcdefghijkl", "bcdefghijklm")]
    return Task(dataset=samples[:size], solver=generate(), scorer=match())
'''


@dataclass
class Sweep:
    """A working directory with an experiment in it."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        return self.directory / "results" / self.config["experiment"]["name"]

    def write(self) -> None:
        (self.directory / "sweep.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))

    def snakemake(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", self.directory]
        command += ["--configfile", self.directory / "sweep.yaml", "--cores", "2", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def run(self, *arguments: str) -> str:
        done = self.snakemake(*arguments)
        logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in self.results.glob("logs/*/*.log"))
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{logs}"
        return done.stdout + done.stderr

    def plan(self, *arguments: str) -> dict[str, int]:
        """The number of jobs that a dry run says would run, by rule."""
        said = self.run("--dry-run", *arguments)
        if "Nothing to be done" in said:
            return {}
        stats = said.split("Job stats:")[1].split("total")[0]
        counts = dict(re.findall(r"^(\w+) +(\d+)$", stats, flags=re.MULTILINE))
        return {rule: int(count) for rule, count in counts.items() if rule != "all"}


def make_model(directory: Path, *arguments: str) -> Path:
    subprocess.run(
        [TRAIN_PYTHON, ROOT / "tests/tiny_model.py", "--output", directory, *arguments], check=True, capture_output=True
    )
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny", "--family", "llama3")


@pytest.fixture(scope="session")
def make_sweep(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[..., Sweep]:
    """Make a working directory with data, a task and an experiment on the tiny model, and no results yet."""

    def make(name: str, **sections: Any) -> Sweep:
        directory = tmp_path_factory.mktemp(name)
        shutil.copytree(model, directory / "model")
        letters = "abcdefghijklmnopqrstuvwxyz"
        samples = [{"input": f"after {a}", "output": b} for a, b in pairwise(letters)]
        (directory / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        (directory / "tasks.py").write_text(TASKS)
        sweep = Sweep(
            directory,
            {
                "experiment": {"name": name},
                "controls": {"epochs": 2, "batch_size": 5, "lr": 1e-2, "apply_lora_to_mlp": True},
                "model": {"path": "model", "dtype": "fp32", "device": "cpu"},
                "data": {"train": "train.jsonl"},
                "evaluation": {"max_tokens": 8, "tasks": ["tasks.py@letters"]},
                **sections,
            },
        )
        sweep.write()
        return sweep

    return make


MODES = {
    "variables": {"model_format": ["hf", "adapter"], "merge_adapters": [True, False]},
    "exclude": [{"model_format": "hf", "merge_adapters": False}],
}

POINTS = {
    "A": "merge_adapters=true,model_format=hf",
    "B1": "merge_adapters=true,model_format=adapter",
    "B2": "merge_adapters=false,model_format=adapter",
}


@pytest.fixture(scope="session")
def finished(make_sweep: Callable[..., Sweep]) -> Sweep:
    """A finished sweep of one training in the three modes, and the baseline."""
    sweep = make_sweep("modes", **MODES)
    sweep.run()
    return sweep
