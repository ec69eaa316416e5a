"""A working directory with an experiment in it, and Snakemake called on it as a person would."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import yaml

from forked_snakemake import call_snakemake
from lorasweep.checkpoints.architecture import ARCHITECTURES

ROOT = Path(__file__).parents[1]
RUN = ROOT / "scripts/run"

TASKS = '''
import os
import time
from pathlib import Path

import anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate, solver


def get_point():
    parts = Path(os.environ.get("XDG_DATA_HOME", "")).parts
    return parts[-4] if len(parts) > 3 else "none"


def told(variable):
    """What the environment tells the evaluation of this point: POINT, or POINT:VALUE."""
    point, _, value = os.environ.get(variable, "").partition(":")
    return (value or "yes") if point == get_point() else ""


@task
def letters(size: int = 6) -> Task:
    """The letter that follows."""
    if file := os.environ.get("HOLD_EVALUATIONS_UNTIL"):
        while not Path(file).exists():
            time.sleep(0.1)
    if told("FAIL_EVALUATION_OF"):
        raise RuntimeError("this evaluation was told to fail")
    if seconds := told("SLOW_EVALUATION_OF"):
        time.sleep(float(seconds))
    if file := told("HELD_EVALUATION_OF"):
        while Path(file).exists():
            time.sleep(0.2)
    if megabytes := told("HUNGRY_EVALUATION_OF"):
        eaten = bytearray(os.urandom(1_000_000)) * int(megabytes)
        time.sleep(10)
    samples = [Sample(input=f"after {a}", target=b) for a, b in zip("abcdefghijkl", "bcdefghijklm")]
    return Task(dataset=samples[:size], solver=[note("begun"), generate(), note("generated")], scorer=match())


@solver
def note(what):
    """Note a sample in a file; before it is begun, wait for ever, if it is not among the first so many: POINT:COUNT."""
    async def solve(state, generate):
        free = told("WAIT_AFTER_SAMPLES")
        if what == "begun" and free and state.sample_id > int(free):
            await anyio.sleep_forever()
        if folder := os.environ.get("NOTE_SAMPLES_IN"):
            with open(f"{folder}/{what}-{get_point()}", "a") as file:
                file.write(f"{state.sample_id}\\n")
        return state
    return solve
'''


SUMMED_UP = {"read_samples": 1, "collect": 1, "report": 1}
"""The jobs that follow any point's clean-up."""

MODES = {"variables": {"mode": ["A", "B1", "B2"]}}

TRAINED_POINTS = 4
"""Points of the sweep `trained` of the end-to-end tests."""

POINTS = {mode: f"mode={mode}" for mode in ("A", "B1", "B2")}


@dataclass
class Sweep:
    """An experiment, and what Snakemake makes of it."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    program: tuple[str | Path, ...] = ("-m", "snakemake")
    """What Python runs, if it is more than Snakemake."""
    file: str = "sweep.yaml"
    """Name of the experiment file."""

    @property
    def results(self) -> Path:
        return self.directory / "results" / self.config["experiment"]["name"]

    def find_training(self, label: str) -> Path:
        """The folder of the newest training of a name, less the digest."""
        found = self.results.glob(f"trainings/{label}-*/recipe.yaml")
        return max(found, key=lambda recipe: recipe.stat().st_mtime_ns).parent

    def find_training_log(self, label: str) -> Path:
        """The log of the job of that training."""
        return self.results / f"logs/train/{self.find_training(label).name}.log"

    def write(self) -> None:
        (self.directory / self.file).write_text(yaml.safe_dump(self.config, sort_keys=False))

    def edit(self, **sections: Any) -> None:
        """Change sections of the experiment file; a mapping lies over the section that is there."""
        for name, section in sections.items():
            merged = isinstance(section, dict) and isinstance(self.config.get(name), dict) and name != "variables"
            self.config[name] = {**self.config[name], **section} if merged else section
        self.write()

    def copy(self, directory: Path) -> "Sweep":
        """The same, results and Snakemake's records included, with the same times, to be changed freely.

        To Snakemake it is the same only in a directory of the same depth: paths of scripts are relative.
        """
        shutil.copytree(self.directory, directory, symlinks=True, dirs_exist_ok=True)
        return Sweep(directory, json.loads(json.dumps(self.config)), dict(self.environment))

    def command(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, *map(str, self.program), *self.list_arguments(*arguments)]

    def list_arguments(self, *arguments: str | Path) -> list[str]:
        where = ["--snakefile", ROOT / "Snakefile", "--directory", self.directory]
        return list(map(str, [*where, "--configfile", self.directory / self.file, *arguments]))

    def snakemake(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **self.environment}
        arguments = (*(() if {"--cores", "--profile"} & {*arguments} else ("--cores", "2")), *arguments)
        if self.program == ("-m", "snakemake"):
            return call_snakemake(self.list_arguments(*arguments), ROOT, environment)
        command = self.command(*arguments)
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)

    @contextmanager
    def start(self, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """Call Snakemake and go on; what it says lies in `said.log`. In the end all that it has started is killed."""
        arguments = (*(() if {"--cores", "--profile"} & {*arguments} else ("--cores", "2")), *arguments)
        environment = {**os.environ, **self.environment}
        with (self.directory / "said.log").open("wb") as said:
            run = subprocess.Popen(
                self.command(*arguments), cwd=ROOT, stdout=said, stderr=said, env=environment, start_new_session=True
            )
        try:
            yield run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.wait()

    def read_said(self) -> str:
        """What the Snakemake that was started has said."""
        return (self.directory / "said.log").read_text()

    def run(self, *arguments: str | Path) -> str:
        done = self.snakemake(*arguments)
        logs = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in self.results.glob("logs/*/*.log"))
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}\n{logs}"
        return done.stdout + done.stderr

    def lorasweep(self, word: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Call a word of the command on this experiment, in its directory."""
        path = os.pathsep.join(filter(None, [str(ROOT / "workflow"), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "lorasweep", word, "sweep.yaml", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.directory,
            env={**os.environ, "COLUMNS": "120", **self.environment, "PYTHONPATH": path},
        )

    def call(self, word: str, *arguments: str | Path) -> str:
        """Call a word that is to end well; return what it says."""
        done = self.lorasweep(word, *arguments)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr

    def plan(self, *arguments: str | Path) -> dict[str, int]:
        """The number of jobs that a dry run says would run, by rule."""
        said = self.run("--dry-run", *arguments)
        if "Nothing to be done" in said:
            return {}
        stats = said.split("Job stats:")[1].split("total")[0]
        counts = dict(re.findall(r"^(\w+) +(\d+)$", stats, flags=re.MULTILINE))
        return {rule: int(count) for rule, count in counts.items() if rule != "all"}


def make_sweep(directory: Path, model: Path, name: str, **sections: Any) -> Sweep:
    """Make a working directory with data, a task and an experiment on a model, and no results yet."""
    shutil.copytree(model, directory / "model")
    # What transformers says of the model is asked for once, not by each test.
    (directory / ".snakemake/lorasweep").mkdir(parents=True)
    (ROOT / ARCHITECTURES).mkdir(parents=True, exist_ok=True)
    (directory / ARCHITECTURES).symlink_to(ROOT / ARCHITECTURES)
    samples = [{"input": f"after {a}", "output": b} for a, b in pairwise(ascii_lowercase)]
    (directory / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (directory / "tasks.py").write_text(TASKS)
    sweep = Sweep(
        directory,
        {
            "experiment": {"name": name},
            "controls": {
                "epochs": 40,
                "batch_size": 5,
                "lr": 4e-3,
                "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
                "apply_lora_to_mlp": True,
            },
            "model": {"path": "model", "dtype": "fp32", "device": "cpu"},
            "data": {"train": "train.jsonl"},
            "evaluation": {"max_tokens": 8, "tasks": ["tasks.py@letters"]},
            "plan": {"count": False},
            **sections,
        },
    )
    sweep.write()
    return sweep


def wait_until(condition: Callable[[], Any], seconds: float = 1800) -> None:
    """Wait for an event; that it does not come is seen at last, however slow the machine is."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def run_stage(stage: str, script: str, *arguments: str | Path, cwd: Path = ROOT) -> str:
    """Run a script of the tests in the environment of a stage."""
    command = [RUN, stage, ROOT / "tests" / script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
