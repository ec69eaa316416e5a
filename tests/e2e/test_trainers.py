"""What holds of every trainer, torchtune's and another, which is a module of the tests; and a sweep that takes that."""

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd
import pytest
from safetensors.numpy import load_file

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls, Data, Model
from lorasweep.trainers import TrainingSpec, get_trainer
from lorasweep.trainers.training_log import COLUMNS, read_log
from lorasweep.util.digest import digest_file
from sweep import ROOT, RUN, Sweep, run_stage

TRAINERS = ("torchtune", "trl", "plain_trainer")

# What other tests say of torchtune: tests/train, and those of the sweep that is finished, which is planned by lengths.
only_others = pytest.mark.parametrize(
    "make_training", [pytest.param("torchtune", marks=pytest.mark.long), "trl", "plain_trainer"], indirect=True
)

JOB = ("-m", "lorasweep", "job")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}

RECORDED = {
    *("trainer", "base_model", "base_model_fingerprint", "recipe_sha256", "adapter_sha256", "data_sha256", "dtype"),
    *("versions", "steps", "epochs", "tokens", "final_train_loss", "final_validation_loss", "peak_memory_bytes"),
}


@dataclass(frozen=True)
class Training:
    """A training's folder with a recipe in it, and the trainer that is to run it."""

    trainer: str
    spec: TrainingSpec

    @property
    def folder(self) -> Path:
        return Path(self.spec.output_dir)

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def run(self, word: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a job as the workflow does: in the trainer's environment."""
        command = [RUN, get_trainer(self.trainer).STAGE, *JOB, word, "--trainer", self.trainer]
        command += ["--recipe", self.folder / "recipe.yaml", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)

    def get_adapter(self, epoch: int) -> Path:
        """Where the adapter of an earlier epoch is published."""
        return self.folder / f"epoch={epoch}"

    def train(self) -> subprocess.CompletedProcess[str]:
        return self.run("train", "--adapter", self.adapter, "--epochs", "1,last")


@pytest.fixture(scope="module", params=TRAINERS)
def make_training(request: pytest.FixtureRequest, model: Path) -> Callable[..., Training]:
    def make(directory: Path, **controls: Any) -> Training:
        samples = [
            {"input": "after " + a * (1 + i % 4), "output": b} for i, (a, b) in enumerate(pairwise(ascii_lowercase))
        ]
        data = directory / "train.jsonl"
        data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        settings = {"epochs": 2, "batch_size": 3, "gradient_accumulation_steps": 3, "lr": 4e-3, **controls}
        spec = TrainingSpec(
            checkpoint=read_checkpoint(model),
            controls=Controls(**settings),
            swept=(),
            model=Model(path=str(model), device="cpu", dtype="fp32"),
            data=Data(train=str(data)),
            output_dir=str(directory / "sweep/trainings/point"),
        )
        training = Training(request.param, spec)
        training.folder.mkdir(parents=True)
        (training.folder / "recipe.yaml").write_text(get_trainer(training.trainer).recipe(spec))
        return training

    return make


@pytest.fixture(scope="module")
def trained(make_training: Callable[..., Training], tmp_path_factory: pytest.TempPathFactory) -> Training:
    training = make_training(tmp_path_factory.mktemp("trained"))
    training.adapter.mkdir()
    (training.adapter / "of_another_training").touch()
    done = training.train()
    assert done.returncode == 0, done.stderr[-2000:]
    return training


def test_it_is_imported_without_what_it_trains_with(trained: Training) -> None:
    program = (
        "import sys; from lorasweep.trainers import get_trainer; get_trainer(sys.argv[1]); "
        "print({'torch', 'torchtune', 'transformers', 'peft'} & set(sys.modules))"
    )
    command = [RUN, get_trainer(trained.trainer).STAGE, "-c", program, trained.trainer]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.strip() == "set()"


def test_a_recipe_is_the_settings_alone(
    trained: Training, make_training: Callable[..., Training], tmp_path: Path
) -> None:
    trainer = get_trainer(trained.trainer)
    assert trainer.recipe(trained.spec) == (trained.folder / "recipe.yaml").read_text()
    assert trainer.recipe(make_training(tmp_path, lr=1e-3).spec) != trainer.recipe(trained.spec)
    assert trainer.declared_adapter_only({}) is None


def test_its_adapter_is_loaded_by_peft_and_by_transformers_and_changes_the_answers(
    trained: Training, model: Path, tmp_path: Path
) -> None:
    merged, logits = tmp_path / "merged", tmp_path / "logits.safetensors"
    paths = ("--base", model, "--adapter", trained.adapter)
    subprocess.run([RUN, "eval", *JOB, "merge", *paths, "--output", merged, "--dtype", "fp32"], check=True)
    run_stage("eval", "e2e/hf_logits.py", *paths, "--merged", merged, "--tokens", "1,2,3,4", "--output", logits)
    program = (
        "import json, sys; from safetensors.torch import load_file; found = load_file(sys.argv[1]); "
        "print(json.dumps({name: float((found[name] - found['peft']).abs().max()) for name in found}))"
    )
    said = subprocess.run([RUN, "eval", "-c", program, logits], check=True, capture_output=True, text=True)
    distances = json.loads(said.stdout)
    assert distances["base"] > 1e-2
    assert distances["transformers"] == 0
    assert distances["merged"] < 1e-4
    assert not (trained.adapter / "of_another_training").exists()
    assert not (trained.adapter / "config.json").exists()


def test_its_log_and_its_record_are_what_others_read(trained: Training, model: Path) -> None:
    log = trained.adapter / "training_log.csv"
    assert log.read_text().splitlines()[0] == ",".join(COLUMNS)
    rows = read_log(log)
    assert [(row.step, row.epoch) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert rows[-1].loss < rows[0].loss
    record = json.loads((trained.adapter / "lorasweep.json").read_text())
    assert record.keys() >= RECORDED
    assert {key: record[key] for key in ("trainer", "steps", "epochs", "tokens", "final_train_loss")} == {
        "trainer": trained.trainer,
        "steps": 4,
        "epochs": 2,
        "tokens": rows[-1].tokens,
        "final_train_loss": rows[-1].loss,
    }
    assert record["base_model_fingerprint"] == read_checkpoint(model).fingerprint
    assert record["recipe_sha256"] == digest_file(trained.folder / "recipe.yaml")
    assert record["data_sha256"] == digest_file(Path(str(trained.spec.data.train)))
    assert record["adapter_sha256"] == digest_file(trained.adapter / "adapter_model.safetensors")
    assert {file.name for file in trained.adapter.iterdir()} >= set(read_checkpoint(model).tokenizer_files)


def test_an_earlier_epoch_has_an_adapter_of_its_own_and_its_part_of_the_log(trained: Training) -> None:
    first = trained.get_adapter(1)
    record = json.loads((first / "lorasweep.json").read_text())
    rows = read_log(first / "training_log.csv")
    assert rows == read_log(trained.adapter / "training_log.csv")[:2]
    assert {key: record[key] for key in ("steps", "epochs", "final_train_loss")} == {
        "steps": 2,
        "epochs": 1,
        "final_train_loss": rows[-1].loss,
    }
    assert record["adapter_sha256"] == digest_file(first / "adapter_model.safetensors")
    assert record["adapter_sha256"] != digest_file(trained.adapter / "adapter_model.safetensors")
    assert {file.name for file in first.iterdir()} == {file.name for file in trained.adapter.iterdir()}


@only_others
def test_a_loss_that_is_not_finite_fails_and_leaves_no_adapter(
    make_training: Callable[..., Training], tmp_path: Path
) -> None:
    training = make_training(tmp_path, lr=1e30)
    done = training.train()
    assert done.returncode == 1
    assert "train: the training diverged: the loss of step 2 is" in done.stderr
    assert [path for path in training.folder.parent.glob("*/*") if "adapter" in path.name] == []
    # Where a run looks for the step that a training makes.
    assert [row.step for row in read_log(training.folder / "state/train/training_log.csv")] == [1]


@pytest.mark.long  # a sweep is planned by them, below
def test_lengths_are_those_of_whole_samples(make_training: Callable[..., Training], tmp_path: Path) -> None:
    training = make_training(tmp_path, max_seq_len=70)
    done = training.run("measure_lengths")
    assert done.returncode == 0, done.stderr[-2000:]
    # As the tokenizer of the tests has them, a token a byte.
    prompt, answer = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "{}<|im_end|>\n"
    samples = [json.loads(line) for line in Path(str(training.spec.data.train)).read_text().splitlines()]
    start, end = len("<|im_start|>") - 1, len("<|im_end|>") - 1
    parts = [
        [len(prompt.format(sample["input"])) - 2 * start - end, len(answer.format(sample["output"])) - end]
        for sample in samples
    ]
    assert json.loads(done.stdout.splitlines()[-1]) == {"parts": {"train": parts}}


@pytest.mark.long  # the next test says so of two others, and those above of this one's adapter
def test_a_sweep_trains_with_the_trainer_that_it_names(make: Callable[..., Sweep]) -> None:
    sweep = make("plain", variables={"lora_rank": [4]}, trainer="plain_trainer")
    sweep.environment["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"]
    sweep.edit(controls={"epochs": 2}, plan={"count": True})
    tasks = [{"task": "tasks.py@letters", "limit": 2}]
    sweep.edit(evaluation={"merge_adapters": False, "baseline": False, "tasks": tasks})
    said = sweep.run("--printshellcmds", "--set-threads", "train=1")
    assert re.search(r"scripts/run'? eval ", said)
    assert "--trainer plain_trainer --recipe" in said
    table = pd.read_csv(sweep.results / "results.csv")
    trained = table[table["mode"] == "B2"]
    assert list(trained["lora_rank"]) == [4]
    assert (trained["probe_distance"] > 0).all()
    assert list(trained["steps"]) == [10]
    manifest = json.loads((sweep.results / "lora_rank=4/manifest.json").read_text())
    assert manifest["training"]["trainer"] == "plain_trainer"
    [counted] = json.loads((sweep.results / "lengths.json").read_text())["counts"]
    assert counted["key"][-1] == "plain_trainer"
    # A token a byte, and one for each of four marks.
    assert counted["parts"]["train"] == [[len("user\nafter a\nassistant\n") + 3, len("b\n") + 1]] * 25
    assert sweep.plan() == {}
    # With another trainer all is trained anew.
    sweep.edit(trainer="torchtune")
    assert sweep.plan()["train"] == 1


def test_trainers_can_be_compared_in_one_sweep(make: Callable[..., Sweep]) -> None:
    sweep = make("both", variables={"trainer": ["torchtune", "trl"]})
    sweep.edit(controls={"epochs": 1}, evaluation={"enabled": False}, plan={"count": True})
    said = sweep.run("--printshellcmds", "--set-threads", "train=1")
    for stage, trainer in (("train", "torchtune"), ("eval", "trl")):
        assert re.search(rf"scripts/run'? {stage} .*--trainer {trainer} ", said)
    table = pd.read_csv(sweep.results / "results.csv").set_index("trainer")
    assert set(table.index) == {"torchtune", "trl"}
    assert table["final_train_loss"].nunique() == 2
    assert table.loc["torchtune", "tokens"] == table.loc["trl", "tokens"]
    counted = json.loads((sweep.results / "lengths.json").read_text())["counts"]
    assert [count["key"][-1] for count in counted] == ["torchtune", "trl"]
    assert counted[0]["parts"] == counted[1]["parts"]
    assert sweep.plan() == {}


@pytest.mark.long  # tests/train trains in two processes, and tests/workflow plans it
def test_a_sweep_trains_in_two_processes(make: Callable[..., Sweep]) -> None:
    sweep = make("shared", variables={"gpus": [2]})
    sweep.edit(controls={"epochs": 1}, evaluation={"enabled": False})
    sweep.run("--until", "cleanup")
    manifest = json.loads((sweep.results / "gpus=2/manifest.json").read_text())
    # 25 samples, 13 of them for each process: two steps of two batches of five.
    assert (manifest["settings"]["gpus"], manifest["training"]["steps"]) == (2, 2)
    weights = load_file(sweep.results / "gpus=2/adapter/adapter_model.safetensors")
    changed = [name for name, value in weights.items() if "lora_B" in name and value.any()]
    assert len(changed) == len(weights) / 2
