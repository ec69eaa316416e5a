"""A published point has what its manifest says, a card that says the same, and no path of this machine."""

import argparse
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard

from evaluation_specs import make_spec
from lorasweep.cli import publish
from lorasweep.evaluation.reproduce import write_reproduction
from lorasweep.evaluation.spec import EvaluationSpec, RoleSpec, TaskSpec
from lorasweep.layout import BASELINE
from lorasweep.results.card import read_license
from lorasweep.util.errors import InputError
from made_results import METRIC, TASK, collect, make_results

POINT = "lora_rank=8"
COMMIT = "0123456789" * 4
DOWNLOADED = f"downloads/org--base@{COMMIT[:12]}"


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A point of an experiment in the working directory, with files and their digests."""
    monkeypatch.chdir(tmp_path)
    results = Path("results/sweep")
    results.mkdir(parents=True)
    make_results(results, {"lora_rank": [4, 8]}, lambda settings: settings["lora_rank"] / 10)
    write_point(results / POINT)
    collect(results, ["lora_rank"])
    return results / POINT


def write_point(
    point: Path, base: str = "/disk/models/base", mode: Any = "B1", spec: EvaluationSpec | None = None, **settings: Any
) -> None:
    """Write the files of a point of `make_results`, and a manifest of them."""
    write_reproduction(spec or make_spec(mode=mode, base_model=base), point, {})
    manifest = json.loads((point / "manifest.json").read_text())
    config = {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "/disk/models/base", **settings}
    training = {**manifest["training"], "base_model": base, "data_sha256": "b" * 64, "final_validation_loss": None}
    manifest["evaluation"]["proof"]["base_model"] = base
    if spec:
        manifest["evaluation"] |= {"spec": spec.model_dump(mode="json"), "evaluation_sha256": spec.sha256}
    files = {
        "adapter/adapter_config.json": json.dumps(config),
        "adapter/adapter_model.safetensors": "weights",
        "adapter/lorasweep.json": json.dumps(training),
        "adapter/tokenizer.json": "{}",
        "eval/metrics.json": json.dumps(manifest["evaluation"]),
        f"eval/{TASK}.eval": "a log",
        "eval/reproduce.py": (point / "eval/reproduce.py").read_text(),
        "recipe.yaml": f"path: {base}\n",
        **({"hf_model/config.json": "{}", "hf_model/model.safetensors": "merged"} if mode == "A" else {}),
    }
    for name, text in files.items():
        (point / name).parent.mkdir(exist_ok=True)
        (point / name).write_text(text)
    manifest |= {
        "mode": mode,
        "adapter_sha256": sha256(b"weights").hexdigest(),
        "training": training,
        "files": [
            {"path": name, "bytes": len(text), "sha256": sha256(text.encode()).hexdigest()}
            for name, text in files.items()
        ],
    }
    (point / "manifest.json").write_text(json.dumps(manifest))


def call(*arguments: str | Path) -> Path:
    """Publish to a folder `published`, and return it."""
    parser = argparse.ArgumentParser()
    publish.add_arguments(parser)
    publish.run(parser.parse_args([*map(str, arguments), "--to", "published"]))
    return Path("published")


def read_card(folder: Path) -> tuple[Any, str]:
    card = ModelCard((folder / "README.md").read_text())
    return card.data, card.text


def test_a_folder_has_the_weights_as_they_are_and_no_path_of_this_machine(point: Path) -> None:
    folder = call("sweep/lora_rank=8", "--base-model", f"org/base@{COMMIT}")
    files = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}
    assert set(files) == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "lorasweep.json", "tokenizer.json"),
        *("manifest.json", "eval/metrics.json", f"eval/{TASK}.eval", "eval/reproduce.py"),
    }
    assert [name for name, text in files.items() if "/disk/" in text or "results/sweep" in text] == []
    config = json.loads(files["adapter_config.json"])
    assert config == {"r": 8, "lora_alpha": 16, "base_model_name_or_path": "org/base", "revision": COMMIT}
    manifest = json.loads(files["manifest.json"])
    assert manifest["adapter_sha256"] == sha256(files["adapter_model.safetensors"].encode()).hexdigest()
    listed = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    assert listed == {
        name: sha256(text.encode()).hexdigest()
        for name, text in files.items()
        if name not in ("README.md", "manifest.json")
    }


def test_an_adopted_adapter_is_published_without_the_place_where_it_was(point: Path) -> None:
    file = point / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["training"] = {"adopted_from": "/disk/adapters/given", "adopted_sha256": manifest["adapter_sha256"]}
    manifest["settings"] = {"adapter": "/disk/adapters/given"}
    record = json.dumps(manifest["training"])
    (point / "adapter/lorasweep.json").write_text(record)
    [entry] = [entry for entry in manifest["files"] if entry["path"] == "adapter/lorasweep.json"]
    entry |= {"bytes": len(record), "sha256": sha256(record.encode()).hexdigest()}
    file.write_text(json.dumps(manifest))
    folder = call(point)
    assert [file for file in folder.rglob("*") if file.is_file() and "/disk/" in file.read_text()] == []
    assert json.loads((folder / "lorasweep.json").read_text())["adopted_from"] == "given"
    text = read_card(folder)[1]
    assert "The adapter was trained elsewhere, and evaluated by lorasweep." in text
    assert "The records do not say how it was trained." in text


def test_only_paths_of_models_and_adapters_are_named_and_the_page_finds_its_scores(
    point: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "/disk/models/qwen"
    roles = {
        "grader": RoleSpec(model=f"hf/{base}", config={}, args={"base_model": base}, fingerprint="f" * 64),
        "judge": RoleSpec(model=f"hf/{base}-72b-judge", config={}, args={}, fingerprint="f" * 64),
    }
    task = TaskSpec(name=TASK, task="tasks.py@letters", args={"file": f"{base}/questions.json"}, limit=None)
    spec = make_spec(base_model=base, tasks=[task], model_roles=roles, prompt="/no_think {input}")
    write_point(point, base, spec=spec)
    (point.parent / "results.parquet").unlink()
    folder = call(point, "--base-model", "Qwen/Qwen3-8B")
    metrics, manifest = (json.loads((folder / name).read_text()) for name in ("eval/metrics.json", "manifest.json"))
    assert manifest["evaluation"] == metrics
    page = (folder / "eval/reproduce.py").read_text()
    literal = page.partition("model_validate(")[2].partition("\n)\n")[0]
    for published in (metrics["spec"], eval(literal.strip())):
        found = EvaluationSpec.model_validate(published)
        assert found == spec.model_copy(update={"base_model": "Qwen/Qwen3-8B"})
        assert found.sha256 == metrics["evaluation_sha256"]
    assert "# base:     Qwen/Qwen3-8B\n" in page
    assert metrics["proof"]["base_model"] == "Qwen/Qwen3-8B"
    # What is left of this machine is told.
    told = f"{base}, {base}/questions.json, hf/{base}, hf/{base}-72b-judge\n"
    assert capsys.readouterr().out.endswith(f"paths of this machine, which stay as they are: {told}")


def test_a_card_says_what_the_manifest_and_the_table_say(point: Path) -> None:
    (point.parent / "lengths.json").write_text(
        json.dumps({"counts": [{"key": ["b" * 64], "parts": {"train": [[1, 2]] * 155}}]})
    )
    table = pd.read_parquet(point.parent / "results.parquet").assign(**{f"{METRIC}:unscored": 3})
    table.to_parquet(point.parent / "results.parquet")
    data, text = read_card(call(point, "--base-model", "org/base"))
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "peft", "text-generation")
    assert "base_model:adapter:org/base" in data.tags
    [result] = data.eval_results
    row = pd.read_parquet(point.parent / "results.parquet").set_index("point").loc[POINT]
    assert (result.dataset_name, result.metric_type, result.metric_value) == (TASK, "accuracy", row[METRIC])
    shown = [f"{row[METRIC]:.3f} [{row[f'{METRIC}:low']:.3f}, {row[f'{METRIC}:high']:.3f}]"]
    shown.append(f"{row[f'{METRIC}:delta']:+.3f} [")
    shown += [f"`{'b' * 64}`, 155 samples", f"`{sha256(b'weights').hexdigest()}`", "| lora_rank | 8 |"]
    shown += ['PeftModel.from_pretrained(base, "published")', "--enable-lora --max-lora-rank 8 --lora-modules"]
    shown += ["| lora_alpha | 16 |", "hf download org/base --local-dir base", f"| tasks.py | `{'d' * 64}` |"]
    shown += ["See the base model.", "| 37 of 40 |"]
    shown += ["A task that loads its data from the hub needs `HF_HUB_OFFLINE=0` before the command"]
    assert [part for part in shown if part not in text] == []


def change_manifest(point: Path, **sections: Any) -> None:
    """Lay sections over those of a point's manifest."""
    file = point / "manifest.json"
    manifest = json.loads(file.read_text())
    laid = {key: {**manifest[key], **value} if isinstance(value, dict) else value for key, value in sections.items()}
    file.write_text(json.dumps(manifest | laid))


@pytest.mark.parametrize(("most", "said"), [(3, 3), (12, 12), (20, 20), (None, 25)])
def test_samples_are_those_that_the_point_was_trained_on(point: Path, most: int | None, said: int) -> None:
    """The plan counts the most samples of the points, and those of the whole data if another trainer reads others."""
    counts = [
        {"key": ["b" * 64], "max_samples": counted, "parts": {"train": [[1, 2]] * number}}
        for counted, number in ((20, 20), (None, 25))
    ]
    refused = {"key": ["b" * 64], "max_samples": None, "refused": "train.jsonl:1: no text"}
    (point.parent / "lengths.json").write_text(json.dumps({"counts": [*counts, refused]}))
    change_manifest(point, settings={"max_samples": most} if most else {})
    assert f"`{'b' * 64}`, {said} samples\n" in read_card(call(point))[1]


def test_the_alpha_of_a_training_is_its_own_where_the_adapter_is_saved_with_another(point: Path) -> None:
    write_point(point, r=16, lora_alpha=32)  # as PEFT saves PiSSA of rank 8 and alpha 16
    change_manifest(point, settings={"init_lora_weights": "pissa", "lora_alpha": 16})
    text = read_card(call(point))[1]
    assert "| lora_rank | 8 |\n" in text
    assert "| lora_alpha | 16 |\n" in text
    assert "--max-lora-rank 16 " in text


@pytest.mark.parametrize("is_adopted", [True, False])
def test_training_and_evaluation_have_their_own_versions_and_precision(point: Path, is_adopted: bool) -> None:
    adopted = {"adopted_from": "x", "dtype": "bf16"} if is_adopted else {}
    change_manifest(
        point,
        training={"versions": {"torch": "2.5.1"}, **adopted},
        evaluation={"versions": {"torch": "2.13.0"}},
        dtype="fp16",
        device="cuda",
    )
    text = read_card(call(point))[1]
    scores, training = text[text.index("## Scores") :].split("## Check it")[0].split("## Training")
    assert "It was evaluated in fp16 on cuda, with torch 2.13.0.\n" in scores
    assert "- with torch 2.5.1\n" in training
    assert ("- bf16\n" if is_adopted else "- fp16 on cuda\n") in training
    assert "2.13.0" not in training
    assert ("cuda" in training) != is_adopted
    assert "\n\n\n" not in text[text.index("## Scores") :]


def test_the_intervals_are_of_the_level_of_the_table_whatever_the_experiment_says_now(point: Path) -> None:
    file = point.parent / "experiment.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"report": {"confidence": 0.8}}))
    assert "score [95 % interval]" in read_card(call(point))[1]


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_tokenizer_is_that_of_the_base_where_none_lies_beside_the_adapter(point: Path, has_tokenizer: bool) -> None:
    if not has_tokenizer:
        manifest = json.loads((point / "manifest.json").read_text())
        change_manifest(point, files=[each for each in manifest["files"] if "token" not in each["path"]])
        (point / "adapter/tokenizer.json").unlink()
    name = "published" if has_tokenizer else "org/base"
    assert f'AutoTokenizer.from_pretrained("{name}")' in read_card(call(point, "--base-model", "org/base"))[1]


BEST = {"epoch": 2, "epochs_trained": 5}
CHOICES = [
    ({**BEST, "validation_loss": 0.5}, "- the best of 5 epochs, by the validation loss\n"),
    (
        {**BEST, "task": {"name": "dev"}, "metric": "match/accuracy", "score": 0.75},
        "- the best of 5 epochs, by `match/accuracy` of the validation task `dev`: 0.75\n",
    ),
]


@pytest.mark.parametrize(("best", "said"), CHOICES, ids=["loss", "task"])
def test_a_card_says_by_what_the_best_epoch_was_chosen(point: Path, best: dict[str, Any], said: str) -> None:
    manifest = json.loads((point / "manifest.json").read_text())
    manifest["training"]["best_epoch"] = best
    (point / "manifest.json").write_text(json.dumps(manifest))
    text = read_card(call(point, "--base-model", "org/base"))[1]
    assert said in text
    assert "\n\n\n" not in text[text.index("## Training") :]


def test_the_base_is_named_as_the_experiment_names_it_on_the_hub(point: Path) -> None:
    write_point(point, DOWNLOADED)
    file = point.parent / "experiment.yaml"
    experiment = yaml.safe_load(file.read_text()) | {"model": {"path": f"hf://org/base@{COMMIT}"}}
    file.write_text(yaml.safe_dump(experiment))
    Path(DOWNLOADED).mkdir(parents=True)
    Path(DOWNLOADED, "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    folder = call(point)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", COMMIT)
    data, text = read_card(folder)
    assert (data.base_model, data.license, data.license_name) == ("org/base", "other", "llama3")
    assert f'from_pretrained("org/base", revision="{COMMIT}", dtype="float32")' in text
    assert "The base model's card says: other (llama3), LICENSE." in text


def test_a_base_without_a_name_on_the_hub_is_named_by_its_folder_and_the_card_says_so(point: Path) -> None:
    folder = call(point)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    data, text = read_card(folder)
    assert data.base_model is None  # the hub would take it for a repository of that name
    assert "- Base model: `base`, a local folder; its name on a hub is not recorded" in text
    assert "hf download" not in text


def test_of_mode_a_the_full_model_is_at_the_top(point: Path) -> None:
    write_point(point, mode="A")
    folder = call(point)
    assert (folder / "model.safetensors").read_text() == "merged"
    assert (folder / "adapter/adapter_model.safetensors").read_text() == "weights"
    data, text = read_card(folder)
    assert data.library_name == "transformers"
    assert "vllm serve published\n" in text
    assert "PeftModel" not in text


def test_what_vllm_does_not_apply_is_told(point: Path) -> None:
    write_point(point, use_dora=True)
    assert "vLLM does not apply this adapter (use_dora)." in read_card(call(point))[1]


def test_logs_can_be_left_out(point: Path) -> None:
    folder = call(point, "--no-logs")
    assert list(folder.rglob("*.eval")) == []
    assert f"eval/{TASK}.eval" not in (folder / "manifest.json").read_text()


@pytest.mark.parametrize("mode", ["A", "B2"])
def test_a_published_folder_is_not_published_again_without_its_weights(point: Path, mode: str) -> None:
    write_point(point, mode=mode)
    call(point).rename("before")
    with pytest.raises(InputError, match="before: is published already: its weights are at the top"):
        call("before")
    assert not Path("published").exists()


def fill(point: Path) -> None:
    Path("published").mkdir()
    Path("published/kept").write_text("")


@pytest.mark.parametrize(
    ("spoil", "arguments", "said"),
    [
        (
            lambda point: (point / "adapter/tokenizer.json").write_text("x"),
            [],
            "json: differs from its manifest",
        ),
        (lambda point: (point / "adapter/tokenizer.json").unlink(), [], "tokenizer.json: is missing"),
        (lambda point: (point / "manifest.json").unlink(), [], "no finished point: it has no manifest.json"),
        (fill, [], "--to: published exists, and is not an empty folder"),
        (lambda point: None, ["--to", "hf://org"], "--to: 'hf://org' is invalid. Expected: hf://org/name, or a folder"),
        (lambda point: None, ["--to", "hf://org/name@branch"], "--to: 'hf://org/name@branch' is invalid"),
        (lambda point: None, ["--private"], "--private is for a repository, but --to is a folder"),
        (lambda point: None, ["--base-model", "base"], "--base-model: 'base' is invalid. Expected: org/name"),
    ],
)
def test_what_cannot_be_published_is_told_and_leaves_nothing(
    point: Path, spoil: Callable[[Path], object], arguments: list[str], said: str
) -> None:
    spoil(point)
    before = sorted(Path().iterdir())
    parser = argparse.ArgumentParser()
    publish.add_arguments(parser)
    with pytest.raises(InputError, match=said):
        publish.run(parser.parse_args([str(point), "--to", "published", *arguments]))
    assert sorted(Path().iterdir()) == before


def test_a_baseline_and_a_table_of_another_adapter_are_refused(point: Path) -> None:
    with pytest.raises(InputError, match="baseline: a baseline has no weights of its own"):
        call(f"sweep/{BASELINE}")
    table = point.parent / "results.parquet"
    whole = pd.read_parquet(table)
    for column in ("adapter_sha256", "evaluation_sha256"):
        whole.assign(**{column: "c" * 64}).to_parquet(table)
        manifest = json.loads((point / "manifest.json").read_text())
        manifest["evaluation"]["evaluation_sha256"] = "e" * 64
        (point / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(
            InputError, match="lora_rank=8 is of another adapter or evaluation; run the experiment again"
        ):
            call(point)


def test_without_a_folder_of_the_base_no_licence_is_read(point: Path) -> None:
    Path("README.md").write_text("---\nlicense: mit\n---\n")
    write_point(point, base="")
    data, text = read_card(call(point, "--base-model", "org/base"))
    assert data.license is None
    assert "See the base model." in text


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\ntext", {"license": "mit"}),
        ("---\nlanguage: en\n---\n", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("# A model\n", {}),
    ],
)
def test_a_licence_is_read_from_the_card_of_the_base(tmp_path: Path, card: str, license: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(card)
    assert read_license(tmp_path) == license
