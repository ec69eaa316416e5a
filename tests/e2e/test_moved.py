"""Results are known by their content: wherever they are, and whatever Snakemake remembers of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from sweep import POINTS, SUMMED_UP, Sweep


@pytest.fixture
def sweep(finished: Sweep, tmp_path: Path) -> Sweep:
    sweep = finished.copy(tmp_path)
    sweep.edit(plan={"count": False})
    return sweep


def forget(sweep: Sweep) -> None:
    shutil.rmtree(sweep.directory / ".snakemake")


def copy_without_times(sweep: Sweep) -> None:
    original = sweep.directory.rename(sweep.directory.with_name("original"))
    shutil.copytree(original, sweep.directory, symlinks=True, copy_function=shutil.copyfile)
    forget(sweep)


def link_to_scratch(sweep: Sweep) -> None:
    scratch = sweep.directory.with_name("scratch")
    shutil.move(sweep.directory / "results", scratch)
    (sweep.directory / "results").symlink_to(scratch)


@pytest.mark.parametrize("move", [forget, copy_without_times, link_to_scratch])
def test_results_that_moved_are_not_made_again(sweep: Sweep, move: Callable[[Sweep], None]) -> None:
    move(sweep)
    assert sweep.plan() == {}


def test_files_with_the_times_of_their_manifests_are_not_read(sweep: Sweep) -> None:
    digests = sweep.results / ".digests.json"
    digests.unlink(missing_ok=True)
    assert sweep.plan() == {}
    assert not digests.exists()
    (sweep.results / POINTS["A"] / "recipe.yaml").touch()
    assert sweep.plan() == {}
    assert [Path(file).name for file in json.loads(digests.read_text())] == ["recipe.yaml"]


def test_a_manifest_that_cannot_be_read_is_made_again(sweep: Sweep) -> None:
    manifest = sweep.results / POINTS["B1"] / "manifest.json"
    manifest.write_text("{}")
    assert sweep.plan() == {"cleanup": 1, **SUMMED_UP}


def test_a_folder_in_another_place_says_what_it_took_over(sweep: Sweep, finished: Sweep) -> None:
    assert f"Taken over from {finished.results.resolve()}: 4 of 4 points match" in sweep.run("--dry-run")


def test_model_and_data_elsewhere_are_the_same(sweep: Sweep) -> None:
    (sweep.directory / "model").rename(sweep.directory / "llama")
    (sweep.directory / "train.jsonl").rename(sweep.directory / "letters.jsonl")
    sweep.edit(model={"path": "llama"}, data={"train": "letters.jsonl"})
    forget(sweep)
    assert sweep.plan() == {"report": 1}  # which shows the paths


def test_a_renamed_experiment_keeps_its_results_under_its_new_name(sweep: Sweep) -> None:
    old = sweep.results
    sweep.edit(experiment={"name": "renamed"})
    old.rename(sweep.results)
    forget(sweep)
    assert sweep.plan() == {"collect": 1, "report": 1}
    manifests = {file: file.read_bytes() for file in sweep.results.glob("*/manifest.json")}
    sweep.run()
    assert sweep.plan() == {}
    assert manifests == {file: file.read_bytes() for file in sweep.results.glob("*/manifest.json")}
    written = [sweep.results / name for name in ("results.csv", "report.html", "experiment.yaml", "answer.json")]
    assert not [file for file in written if "results/modes" in file.read_text()]
    table = pd.read_csv(sweep.results / "results.csv")
    assert all(Path(sweep.directory, log).is_file() for log in table["log"])
    assert "match their manifests and the experiment" in sweep.call("verify")


@pytest.mark.parametrize("remembers", [True, False])
def test_settings_that_changed_make_every_point_again_and_the_plan_says_why(sweep: Sweep, remembers: bool) -> None:
    if not remembers:
        forget(sweep)
    sweep.edit(controls={"lr": 5e-3})
    said = sweep.run("--dry-run")
    assert "mode=A, mode=B1, mode=B2: take: lr was 4e-3, is 5e-3" in said
    assert sweep.plan()["take"] == 3
    assert "lr was 4e-3, is 5e-3" in sweep.lorasweep("verify").stdout


@pytest.mark.parametrize(
    ("file", "jobs", "said"),
    [
        (
            f"{POINTS['B2']}/adapter/adapter_model.safetensors",
            {"take": 1, "cleanup": 1, **SUMMED_UP},  # its training has the bytes that were evaluated
            "adapter/adapter_model.safetensors is not as it was made",
        ),
        (
            f"{POINTS['A']}/hf_model/model.safetensors",
            {"export": 1, "cleanup": 1, **SUMMED_UP},
            "hf_model/model.safetensors is not as it was made",
        ),
        (
            f"{POINTS['B1']}/eval/letters.eval",
            {"merge": 1, "evaluate": 1, "cleanup": 1, **SUMMED_UP},
            "eval/letters.eval is not as it was made",
        ),
    ],
)
def test_a_file_with_other_bytes_is_made_again(sweep: Sweep, file: str, jobs: dict[str, int], said: str) -> None:
    path = sweep.results / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # hard links of other places keep theirs
    path.write_bytes(content)
    assert said in sweep.run("--dry-run")
    assert sweep.plan() == jobs


def test_an_adapter_that_comes_from_elsewhere_is_noticed(sweep: Sweep) -> None:
    """The record of the adapter is exchanged with it, so that the two agree."""
    adapter = sweep.results / POINTS["B1"] / "adapter"
    record = json.loads((adapter / "lorasweep.json").read_text())
    content = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.safetensors").write_bytes(content)
    (adapter / "lorasweep.json").write_text(json.dumps(record | {"recipe_sha256": "0" * 64}))
    (adapter.parent / "manifest.json").unlink()
    assert sweep.plan()["take"] == 1
