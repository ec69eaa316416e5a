"""References to the hub: what they are read as, and where what they name lies."""

from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.sections import Experiment
from lorasweep.hub.references import (
    Reference,
    check_fetched,
    find_references,
    read_model_name,
    read_reference,
    read_revisions,
    with_commits,
    with_local_paths,
)
from lorasweep.util.errors import InputError

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("text", "reference", "path"),
    [
        ("hf://org/name", Reference("org/name", "main"), "org--name@main"),
        (f"hf://org/na.me-7B@{COMMIT}", Reference("org/na.me-7B", COMMIT), "org--na.me-7B@012345678901"),
        ("hf://org/name@refs/pr/1", Reference("org/name", "refs/pr/1"), None),
        (
            f"hf://datasets/org/name@{COMMIT}/a/b.parquet",
            Reference("org/name", COMMIT, "a/b.parquet"),
            "datasets/org--name@012345678901/a/b.parquet",
        ),
        ("hf://datasets/org/name/a.jsonl", Reference("org/name", "main", "a.jsonl"), None),
        (
            "hf://datasets/org/name@refs/convert/parquet/default/train/0000.parquet",
            Reference("org/name", "refs/convert/parquet", "default/train/0000.parquet"),
            None,
        ),
    ],
)
def test_a_reference_is_read_and_written(text: str, reference: Reference, path: str | None) -> None:
    read = read_reference(text)
    assert read == reference
    assert read_reference(str(read)) == reference
    if path:
        assert reference.path == Path("downloads", path)


@pytest.mark.parametrize("text", ["model", "models/hf", "/data/model", "data/train.jsonl"])
def test_a_local_path_is_none(text: str) -> None:
    assert read_reference(text) is None


@pytest.mark.parametrize("text", ["org/name", "org/na.me-7B@v1", "org/name@refs/pr/1"])
def test_a_model_may_lack_the_prefix_if_no_path_has_its_name(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_model_name(text) == read_reference(f"hf://{text}")
    (tmp_path / text).mkdir(parents=True)
    assert read_model_name(text) is None


@pytest.mark.parametrize(
    "text", ["model", "./model", "../model", "/org/name", "a/b/c", "models/", "hf://org/name", "a/ b"]
)
def test_what_can_only_be_a_path_is_none(text: str) -> None:
    assert read_model_name(text) is None


@pytest.fixture
def experiment() -> Experiment:
    baselines = [{"name": "other", "model": "hf://org/other@v1"}, {"name": "local", "model": "models/local"}]
    config = {
        "experiment": {"name": "x"},
        "model": {"path": "hf://org/name"},
        "data": {"train": f"hf://datasets/org/d@{COMMIT}/a.jsonl", "validation": "b.jsonl"},
        "evaluation": {"baselines": baselines},
    }
    return load_experiment(config, "my.yaml")


def test_what_was_fetched_stands_in_place_of_each_reference(experiment: Experiment) -> None:
    revisions = {"models/org/name@main": "a" * 40, "models/org/other@v1": "b" * 40}
    local = with_local_paths(experiment, revisions)
    assert local.model.path == "downloads/org--name@aaaaaaaaaaaa"
    assert (local.data.train, local.data.validation) == ("downloads/datasets/org--d@012345678901/a.jsonl", "b.jsonl")
    assert [b.model for b in local.evaluation.baselines] == ["downloads/org--other@bbbbbbbbbbbb", "models/local"]
    pinned = with_commits(experiment, revisions)
    assert pinned.evaluation.baselines[0].model == f"hf://org/other@{'b' * 40}"
    assert with_local_paths(pinned, {}) == local


def test_data_of_single_points_are_references_too(experiment: Experiment) -> None:
    def name(letter: str) -> str:
        return f"hf://datasets/org/d@{COMMIT}/{letter}.jsonl"

    sections: dict[str, Any] = {
        "data": {"sets": {"a": {"train": name("a"), "max_samples": 3}, "b": {"validation": [name("b"), "c.jsonl"]}}},
        "variables": {"train": [name("d"), [name("e"), "f.jsonl"]], "seed": [0]},
        "sample": {"points": 1, "space": {"validation": [name("g")], "lora_rank": [4]}},
        "exclude": [{"train": name("d")}, f"seed == 1 and train != '{name('d')}'"],
        "runs": [{"name": "x", "train": name("h")}],
    }
    config = {"experiment": {"name": "x"}, "model": {"path": "m"}, **sections}
    experiment = load_experiment(config, "my.yaml")
    places = {
        "data.sets.a.train": "a",
        "data.sets.b.validation.0": "b",
        "variables.train.0": "d",
        "variables.train.1.0": "e",
        "sample.space.validation.0": "g",
        "exclude.0.train": "d",
        "exclude.1": "d",
        "runs.0.train": "h",
    }
    found = find_references(experiment)
    assert {key: str(reference) for key, reference in found.items()} == {key: name(at) for key, at in places.items()}
    local = with_local_paths(experiment, {})
    path = "downloads/datasets/org--d@012345678901"
    assert local.data.sets["a"].given == {"train": f"{path}/a.jsonl", "max_samples": 3}
    assert local.data.sets["b"].given == {"validation": (f"{path}/b.jsonl", "c.jsonl")}
    assert local.variables == {"train": [f"{path}/d.jsonl", [f"{path}/e.jsonl", "f.jsonl"]], "seed": [0]}
    assert local.sample
    assert {key: part.choices for key, part in local.sample.space.items()} == {
        "validation": [f"{path}/g.jsonl"],
        "lora_rank": [4],
    }
    assert local.exclude == [{"train": f"{path}/d.jsonl"}, f"seed == 1 and train != '{path}/d.jsonl'"]
    assert local.runs == [{"name": "x", "train": f"{path}/h.jsonl"}]
    assert with_commits(experiment, {}) == experiment
    with pytest.raises(InputError, match=r"^data\.sets\.a\.train: hf://\S+ is not downloaded"):
        check_fetched(experiment, {}, "my.yaml")


def test_what_was_not_fetched_is_told_with_what_fetches_it(experiment: Experiment) -> None:
    said = r"^model\.path: hf://org/name@main is not downloaded; run: lorasweep download my\.yaml"
    with pytest.raises(InputError, match=said):
        check_fetched(experiment, {}, "my.yaml")


def test_a_record_of_another_hand_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "revisions.json").write_text("[1]")
    with pytest.raises(InputError, match=r"revisions\.json: not the record"):
        read_revisions(tmp_path / "revisions.json")
