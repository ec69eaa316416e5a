"""How trainings are watched, and on what they are validated: what reruns, and what is refused."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.util.digest import digest_file
from sweep import SUMMED_UP, Sweep

LETTERS = '{"input": "after a", "output": "b"}\n'


def pretend_to_train(sweep: Sweep) -> None:
    """Leave what a training leaves, as far as Snakemake looks."""
    sweep.run("configure_all")
    for recipe in sweep.results.glob("trainings/*/recipe.yaml"):
        (recipe.parent / "adapter").mkdir(exist_ok=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (recipe.parent / "adapter" / name).write_text("{}")
        record = {
            "recipe_sha256": digest_file(recipe),
            "adapter_sha256": digest_file(recipe.parent / "adapter/adapter_model.safetensors"),
            "base_model_fingerprint": read_checkpoint(sweep.directory / "model").fingerprint,
        }
        (recipe.parent / "adapter/lorasweep.json").write_text(json.dumps(record))
    sweep.run("--touch", "--forcerun", "train", "--until", "train")
    sweep.run("--until", "take")


@pytest.fixture
def trained(make: Callable[..., Sweep]) -> Sweep:
    sweep = make()
    sweep.edit(evaluation={"enabled": False})
    pretend_to_train(sweep)
    return sweep


def test_a_change_of_how_trainings_are_watched_and_saved_reruns_nothing(trained: Sweep) -> None:
    before = trained.plan()
    assert "train" not in before
    assert "configure" not in before
    trained.edit(training={"metric_loggers": ["disk", "tensorboard", "wandb"], "save_minutes": 3})
    assert trained.plan() == before
    said = trained.run("--dry-run", "--printshellcmds", "--forcerun", "train")
    assert "--metric-loggers disk,tensorboard,wandb --save-minutes 3 " in said


def test_validation_data_that_is_added_or_edited_trains_anew(trained: Sweep) -> None:
    file = trained.directory / "held_out.jsonl"
    file.write_text(LETTERS)
    trained.edit(data={"validation": "held_out.jsonl"})
    assert trained.plan()["train"] == 2
    trained.run("configure_all")
    recipes = trained.results.glob("trainings/lora_rank=4-*/recipe.yaml")
    recipe = max(recipes, key=lambda recipe: recipe.stat().st_mtime_ns)
    assert "\n# validation data sha256: " in recipe.read_text()
    assert "configure" not in trained.plan()
    file.write_text(LETTERS * 2)
    assert trained.plan()["configure"] == 2


def test_the_best_epoch_is_a_training_of_its_own_and_patience_is_another(trained: Sweep) -> None:
    (trained.directory / "held_out.jsonl").write_text(LETTERS)
    trained.edit(data={"validation": "held_out.jsonl"})
    pretend_to_train(trained)
    done = trained.plan()
    assert "train" not in done
    for sections in ({"evaluation": {"epochs": "best"}}, {"controls": {"patience": 2}}):
        trained.edit(**sections)
        assert trained.plan() == {**done, "configure": 2, "train": 2, "take": 2, "cleanup": 2}
        pretend_to_train(trained)
    said = trained.run("--dry-run", "--printshellcmds", "--forcerun", "train")
    assert "--epochs best " in said
    assert "  Trainings are planned with all their epochs, which is an upper bound" in said
    assert "epoch=" not in said
    assert not list(trained.results.glob("*__epoch=*"))


def test_a_task_that_chooses_epochs_has_a_job_for_each_training(make: Callable[..., Sweep]) -> None:
    sweep = make(variables={"lora_rank": [4, 8], "mode": ["A", "B1"]})
    dev = {"task": "tasks.py@letters", "name": "dev", "args": {"size": 3}, "higher_is_better": False}
    sweep.edit(controls={"epochs": 3}, evaluation={"epochs": "best", "validation_task": dev, "enabled": False})
    jobs = {"configure": 2, "train": 2, "choose_epoch": 2, "take": 4, "export": 2, "cleanup": 4, **SUMMED_UP}
    assert sweep.plan() == jobs
    said = sweep.run("--dry-run", "--printshellcmds")
    assert len(re.findall(r"--adapter \S+/epoch=last .* --epochs 1,2,last ", said)) == 2
    assert len(re.findall(r"job choose_epoch .* --training \S+ --epochs 3 --lower-is-better --gpus 0 ", said)) == 2
    sweep.call("plan", "--cores", "2")
    plan = json.loads((sweep.results / "plan.json").read_text())
    assert plan["to_do"]["jobs"] == plan["whole"]["jobs"] == jobs
    assert {"train", "choose_epoch", "export"} == plan["to_do"]["job_hours"].keys()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"validation": "none.jsonl"}}, "data.validation: no such file: none.jsonl"),
        ({"data": {"validation": "bad.jsonl"}}, "bad.jsonl:1: no column 'output' (data.output_column)"),
        ({"training": {"metric_loggers": ["tensorbord"]}}, "training.metric_loggers.0: 'tensorbord' is invalid"),
        ({"training": {"metric_loggers": ["trackio"]}}, "'wandb' or 'mlflow'; no release of trackio goes with"),
        ({"runs": [{"name": "wandb"}]}, "wandb"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(make: Callable[..., Sweep], sections: dict[str, Any], said: str) -> None:
    sweep = make()
    (sweep.directory / "bad.jsonl").write_text('{"input": "a"}\n')
    sweep.edit(**sections)
    refused = sweep.snakemake()
    assert refused.returncode == 1
    assert said in refused.stdout + refused.stderr
