"""What is found to be of another experiment, of adapters that were not trained here."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasweep.adapters.identity import digest_config
from lorasweep.layout import MERGED
from lorasweep.running.outdated import find_outdated
from lorasweep.sweep.sweep import Sweep
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_record
from plain_checkpoint import write_checkpoint

MODES = {"full": {"model_format": "hf"}, "merged": {"merge_adapters": True}, "direct": {"merge_adapters": False}}
AGAIN = {
    *(("adopt", name) for name in MODES),
    *{("export", "full"), ("evaluate", "full"), ("merge", "merged"), ("evaluate", "merged"), ("publish", "direct")},
}


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Sweep]:
    """A sweep of an existing adapter in each mode, and of the same weights with another alpha."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "model")
    Path("tasks.py").write_text("@task\ndef letters():\n    pass\n")
    for name, alpha in {"x": 8, "y": 80}.items():
        folder = Path("adapters", name)
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
        write_config(folder, lora_alpha=alpha)

    def load(source: str = "x") -> Sweep:
        config = {
            "experiment": {"name": "mine"},
            "model": {"path": "model", "device": "cpu"},
            "runs": [{"name": name, "adapter": f"adapters/{source}", **mode} for name, mode in MODES.items()],
            "evaluation": {"baseline": False, "tasks": ["tasks.py@letters"]},
        }
        return Sweep.load(config, "mine.yaml")

    return load


def write_config(folder: Path, **keys: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "target_modules": ["q_proj"], **keys}))


def finish(sweep: Sweep, is_of_today: bool = True) -> None:
    """Leave the results of each point; those of earlier versions tell nothing of an adapter's configuration."""
    for name, point in sweep.points.items():
        folder, source = sweep.results / name, Path(str(point.adapter))
        shutil.copytree(source, folder / "adapter")
        weights = digest_file(source / "adapter_model.safetensors")
        base = {"base_model_fingerprint": sweep.get_fingerprint(name)}
        given = {"adopted_config_sha256": digest_config(source)} if is_of_today else {}
        write_record(folder / "adapter/lorasweep.json", {"adopted_sha256": weights, **given, **base})
        known = {"adapter_sha256": weights}
        known |= {"adapter_config_sha256": digest_config(source)} if is_of_today else {}
        made = {**known, **base, "precision": sweep.get_dtype(name)}
        if point.mode != "B2":
            model = folder / "hf_model" if point.mode == "A" else sweep.results / MERGED / name
            write_record(model / "lorasweep.json", made)
        metrics = {**known, "evaluation_sha256": sweep.get_evaluation_spec(name).sha256}
        write_record(folder / "eval/metrics.json", metrics)
        (folder / "eval/letters.eval").write_text("log")


def list_again(sweep: Sweep) -> set[tuple[str, str]]:
    """The jobs that make an adapter or its scores again."""
    summing = ("cleanup", "read_samples", "collect", "report")
    return {(found.rule, found.name) for found in find_outdated(sweep) if found.rule not in summing}


@pytest.mark.parametrize("is_of_today", [True, False], ids=["today", "earlier"])
class TestAnExistingAdapter:
    def test_is_not_made_again_for_the_form_of_its_configuration(
        self, load: Callable[..., Sweep], is_of_today: bool
    ) -> None:
        finish(load(), is_of_today)
        file = Path("adapters/x/adapter_config.json")
        config = json.loads(file.read_text()) | {"base_model_name_or_path": "elsewhere", "use_dora": False}
        file.write_text(json.dumps(config, indent=3, sort_keys=True))
        assert list_again(load()) == set()

    def test_is_another_with_another_configuration(self, load: Callable[..., Sweep], is_of_today: bool) -> None:
        finish(load(), is_of_today)
        write_config(Path("adapters/x"), lora_alpha=80)
        assert list_again(load()) == AGAIN

    def test_is_another_in_a_folder_with_another_configuration(
        self, load: Callable[..., Sweep], is_of_today: bool
    ) -> None:
        finish(load(), is_of_today)
        assert list_again(load("y")) == AGAIN

    def test_that_was_adopted_again_is_evaluated_again_after_an_interruption(
        self, load: Callable[..., Sweep], is_of_today: bool
    ) -> None:
        finish(load(), is_of_today)
        for name in MODES:
            folder = load().results / name / "adapter"
            write_config(folder, lora_alpha=80)
            record = json.loads((folder / "lorasweep.json").read_text())
            write_record(folder / "lorasweep.json", {**record, "adopted_config_sha256": digest_config(folder)})
        assert list_again(load("y")) == {job for job in AGAIN if job[0] != "adopt"}
