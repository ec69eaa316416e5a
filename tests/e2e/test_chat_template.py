"""A chat template in place of the base model's own holds in training, in every mode, and in what is kept."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorasweep.util.digest import digest_file
from recipes import GIVEN_TEMPLATE
from sweep import MODES, POINTS, ROOT, RUN, SUMMED_UP, Sweep, make_sweep

ALL = (*POINTS.values(), "baseline")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, model_without_template: Path) -> Sweep:
    """A finished sweep of one training in the three modes, on a model without a template, and the baseline."""
    sweep = make_sweep(tmp_path_factory.mktemp("given"), model_without_template, "given", **MODES)
    (sweep.directory / "own.jinja").write_text(GIVEN_TEMPLATE)
    sweep.edit(model={"chat_template": "own.jinja"}, plan={"count": True})
    assert "has no chat template" not in sweep.run()
    return sweep


@pytest.mark.long
def test_it_is_asked_by_and_kept_in_every_mode(sweep: Sweep) -> None:
    digest = digest_file(sweep.directory / "own.jinja")
    [recipe] = sweep.results.glob("trainings/*/recipe.yaml")
    assert yaml.safe_load(recipe.read_text())["tokenizer"]["chat_template"] == GIVEN_TEMPLATE
    kept = [sweep.results / POINTS["A"] / "hf_model", *(sweep.results / point / "adapter" for point in POINTS.values())]
    for folder in kept:
        assert digest_file(folder / "chat_template.jinja") == digest
        assert json.loads((folder / "lorasweep.json").read_text())["chat_template_sha256"] == digest
    answers = set()
    for point in ALL:
        metrics = json.loads((sweep.results / point / "eval/metrics.json").read_text())
        assert metrics["spec"]["chat_template"] == GIVEN_TEMPLATE
        if point != "baseline":
            answers.add(json.dumps(metrics["tasks"]["letters"]["scores"]))
    assert len(answers) == 1
    assert json.loads(answers.pop())["match/accuracy"] == 1
    assert sweep.plan() == {}


@pytest.mark.long
def test_an_edit_of_its_text_makes_all_again_that_it_writes_and_another_path_nothing(
    sweep: Sweep, tmp_path: Path
) -> None:
    edited = sweep.copy(tmp_path / "edited")
    shutil.move(edited.directory / "own.jinja", edited.directory / "moved.jinja")
    edited.edit(model={"chat_template": "moved.jinja"})
    assert edited.plan().keys() <= SUMMED_UP.keys()
    (edited.directory / "moved.jinja").write_text(GIVEN_TEMPLATE.replace("<assistant>", "<answer>"))
    made = {"configure": 1, "train": 1, "take": 3, "export": 1, "merge": 1, "evaluate": 3, "evaluate_adapters": 1}
    assert edited.plan() == {**made, "publish": 1, "cleanup": 4, **SUMMED_UP}
    assert "trained with other settings" in edited.run("--dry-run")
    # Without training, only evaluations are.
    edited.edit(model={"chat_template": None})
    assert edited.plan()["train"] == 1


@pytest.mark.long
def test_an_adopted_adapter_is_asked_by_it_and_an_edit_evaluates_it_again(sweep: Sweep, tmp_path: Path) -> None:
    adopting = sweep.copy(tmp_path / "adopting")
    shutil.copytree(sweep.results / POINTS["A"] / "adapter", adopting.directory / "mine")
    runs = [{"name": mode, "adapter": "mine", **keys} for mode, keys in KEPT.items()]
    adopting.edit(experiment={"name": "adopted"}, variables={}, runs=runs, model={"chat_template": "own.jinja"})
    adopting.config["controls"] = {}
    adopting.write()
    adopting.run()
    digest = digest_file(adopting.directory / "own.jinja")
    for folder in ("full/hf_model", "full/adapter", "alone/adapter"):
        assert digest_file(adopting.results / folder / "chat_template.jinja") == digest
    for point in KEPT:
        scores = json.loads((adopting.results / point / "eval/metrics.json").read_text())["tasks"]["letters"]["scores"]
        assert scores["match/accuracy"] == 1
    assert adopting.plan() == {}
    (adopting.directory / "own.jinja").write_text(GIVEN_TEMPLATE.replace("<assistant>", "<answer>"))
    made = {"adopt": 2, "export": 1, "evaluate": 2, "evaluate_adapters": 1, "publish": 1, "cleanup": 3}
    assert adopting.plan() == {**made, **SUMMED_UP}
    adopting.edit(model={"chat_template": None})
    assert adopting.plan() == {**made, **SUMMED_UP}
    adopting.run()
    assert not list(adopting.results.glob("*/*/chat_template.jinja"))
    assert "chat_template_sha256" not in json.loads((adopting.results / "full/hf_model/lorasweep.json").read_text())


KEPT = {"full": {"model_format": "hf"}, "alone": {"merge_adapters": False}}


@pytest.mark.long
def test_the_page_of_each_evaluation_asks_by_it_when_the_file_is_gone(sweep: Sweep, tmp_path: Path) -> None:
    inherited = sweep.copy(tmp_path / "inherited")
    (inherited.directory / "own.jinja").unlink()
    for point in ALL:
        page = inherited.results / point / "eval/reproduce.py"
        done = subprocess.run([RUN, "eval", page], cwd=inherited.directory, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.endswith("The scores are those recorded.\n")


@pytest.mark.long
@pytest.mark.parametrize("mode", ["A", "B2"])
def test_a_published_point_has_it(sweep: Sweep, mode: str, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT / "workflow"), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lorasweep", "publish", sweep.results / POINTS[mode], "--to", tmp_path / "made"]
    subprocess.run(command, cwd=sweep.directory, env={**os.environ, "PYTHONPATH": path}, check=True)
    assert (tmp_path / "made/chat_template.jinja").read_text() == GIVEN_TEMPLATE
    card = (tmp_path / "made/README.md").read_text()
    assert "`chat_template.jinja` replaces the chat template of the base model" in card
    assert ("--chat-template chat_template.jinja\n" in card) == (mode == "B2")
