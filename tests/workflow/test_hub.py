"""What an experiment names on the hub is fetched once, whole or not at all, and stays what it was."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from hub_server import TOKEN, Hub, read_files, serve
from lorasweep.experiment.training_data import read_samples
from sweep import ROOT, Sweep

UNREAD = {"pytorch_model.bin": b"\0" * 1000, "original/consolidated.00.pth": b"\0" * 1000}


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with serve() as hub:
        hub.add("models/org/plain", read_files(model) | UNREAD)
        yield hub


@pytest.fixture
def sweep(make: Callable[..., Sweep], hub: Hub) -> Sweep:
    sweep = make()
    # Without tasks, which take seconds to load.
    sweep.edit(model={"path": "hf://org/plain"}, evaluation={"enabled": False})
    sweep.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": ""}
    return sweep


def get_base(sweep: Sweep) -> Path:
    recipe = yaml.safe_load((sweep.find_training("lora_rank=4") / "recipe.yaml").read_text())
    return Path(recipe["checkpointer"]["checkpoint_dir"])


def get_folder(hub: Hub, name: str = "plain") -> str:
    return f"downloads/org--{name}@{hub.repositories[f'models/org/{name}'].branches['main'][:12]}"


def test_a_model_is_fetched_once_and_read_as_a_local_one(sweep: Sweep, hub: Hub, model: Path) -> None:
    sweep.call("download")
    sweep.run("configure_all")
    assert str(get_base(sweep)) == get_folder(hub)
    assert read_files(sweep.directory / get_base(sweep)) == read_files(model)
    hub.requests.clear()
    assert sweep.plan("configure_all") == {}
    assert sweep.call("download").count(get_folder(hub)) == 1
    assert hub.requests == []
    written = yaml.safe_load((sweep.results / "experiment.yaml").read_text())
    assert written["model"]["path"] == f"hf://org/plain@{hub.repositories['models/org/plain'].branches['main']}"


def test_cards_templates_vocabularies_and_code_are_fetched_with_a_model(sweep: Sweep, hub: Hub, model: Path) -> None:
    names = ("additional_chat_templates/tool_use.jinja", "tokenizer.model", "qwen.tiktoken", "modeling_own.py")
    names = (*names, "custom_generate/generate.py", "vocab.txt", "README.md", "LICENSE.txt")
    files = read_files(model) | dict.fromkeys(names, b"own")
    hub.add("models/org/rich", files | UNREAD)
    sweep.edit(model={"path": "hf://org/rich"})
    sweep.call("download")
    assert read_files(sweep.directory / get_folder(hub, "rich")) == files


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--lint",), ("--summary",), ("--dag",), ("--unlock",)])
def test_snakemake_asks_no_hub_and_says_what_to_do(sweep: Sweep, hub: Hub, options: tuple[str, ...]) -> None:
    refused = sweep.snakemake(*options)
    assert refused.returncode == 1
    assert "sweep.yaml: model.path: hf://org/plain@main is not downloaded; run: lorasweep download " in refused.stderr
    assert hub.requests == []


def test_a_dry_run_says_what_would_be_fetched_and_fetches_and_writes_nothing(sweep: Sweep, hub: Hub) -> None:
    before = read_files(sweep.directory)
    said = sweep.call("download", "--dry-run")
    assert "hf://org/plain@main: " in said
    assert f"B, to {get_folder(hub)}\n" in said
    assert {path for path in read_files(sweep.directory) if ".snakemake" not in path} == {
        path for path in before if ".snakemake" not in path
    }
    assert not [path for _, path in hub.requests if "/resolve/" in path]
    sweep.call("download")
    assert sweep.plan()["train"] == 2
    assert "Everything is downloaded." in sweep.call("download", "--dry-run")


@pytest.mark.long  # tests/unit says so of references
def test_a_model_is_named_as_on_the_hub_where_no_directory_has_that_name(sweep: Sweep, hub: Hub, model: Path) -> None:
    sweep.edit(model={"path": "org/plain"}, evaluation={"base_model": "org/plain"})
    absent = "sweep.yaml: model.path: no such directory: 'org/plain'. If this model on the hub is meant, run: "
    said = sweep.run("--dry-run")
    assert f"{absent}lorasweep download {sweep.directory / 'sweep.yaml'}" in said
    assert "A dry run continues without it" in said
    refused = sweep.snakemake("configure_all")
    assert refused.returncode == 1
    assert absent in refused.stderr
    assert hub.requests == []
    said = sweep.call("download", "--dry-run")
    assert f"  hf://org/plain@main: {len(read_files(model))} files, " in said
    assert said.count(f"B, to {get_folder(hub)}\n") == 1
    assert not (sweep.directory / "downloads").exists()
    sweep.call("download")
    hub.requests.clear()
    sweep.run("configure_all")
    assert hub.requests == []
    assert str(get_base(sweep)) == get_folder(hub)
    written = yaml.safe_load((sweep.results / "experiment.yaml").read_text())
    commit = hub.repositories["models/org/plain"].branches["main"]
    assert written["model"]["path"] == written["evaluation"]["base_model"] == f"hf://org/plain@{commit}"
    sweep.edit(model={"path": "hf://org/plain"}, evaluation={"base_model": f"org/plain@{commit}"})
    assert sweep.plan("configure_all") == {}
    shutil.copytree(model, sweep.directory / "org/plain")
    sweep.edit(model={"path": "org/plain"}, evaluation={"base_model": None})
    sweep.run("configure_all")
    assert str(get_base(sweep)) == "org/plain"


@pytest.mark.long  # tests/unit says so of the commits on record
def test_a_branch_that_moves_changes_no_sweep_that_has_begun(sweep: Sweep, hub: Hub, model: Path) -> None:
    sweep.call("download")
    sweep.run("configure_all")
    before = get_base(sweep)
    hub.repositories["models/org/plain"].commit(read_files(model) | {"generation_config.json": b"{}"})
    sweep.call("download")
    assert sweep.plan("configure_all") == {}
    sweep.edit(experiment={"name": "another"})
    sweep.call("download")
    sweep.run("configure_all")
    assert str(get_base(sweep)) == get_folder(hub) != str(before)
    assert (sweep.directory / before).is_dir()


def test_a_fetch_that_is_interrupted_leaves_no_model_and_is_gone_on_with(sweep: Sweep, hub: Hub, model: Path) -> None:
    hub.breaks = True
    broken = sweep.lorasweep("download")
    assert broken.returncode == 1
    assert "model.path: hf://org/plain@" in broken.stdout + broken.stderr
    assert "run the same command again to resume it" in broken.stdout + broken.stderr
    assert not (sweep.directory / get_folder(hub)).exists()
    hub.breaks = False
    hub.requests.clear()
    sweep.call("download")
    sweep.run("configure_all")
    assert read_files(sweep.directory / get_base(sweep)) == read_files(model)
    assert hub.count("GET", "/config.json") == 0


def test_of_two_at_once_one_fetches_and_the_other_waits(sweep: Sweep, hub: Hub, model: Path) -> None:
    hub.seconds = 1
    others = [Sweep(sweep.directory, {**sweep.config, "experiment": {"name": name}}) for name in ("one", "two")]
    for other in others:
        (sweep.directory / f"{other.results.name}.yaml").write_text(yaml.safe_dump(other.config))
    environment = {**os.environ, **sweep.environment, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, "-m", "lorasweep", "download"]
    runs = [
        subprocess.Popen([*command, f"{other.results.name}.yaml"], cwd=sweep.directory, env=environment)
        for other in others
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert read_files(sweep.directory / get_folder(hub)) == read_files(model)
    assert {hub.count("GET", f"/{name}") for name in read_files(model)} == {1}


@pytest.mark.long  # tests/unit says so of the files
def test_files_of_a_data_set_are_fetched_and_trained_on_as_they_are(sweep: Sweep, hub: Hub) -> None:
    samples = [{"input": f"after {letter}", "output": "é"} for letter in "abcdefgh"]
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(samples), table)
    lines = "".join(json.dumps(sample) + "\n" for sample in samples).encode()
    files = {"data/train.parquet": table.getvalue(), "validation.jsonl": lines, "more.csv": b"input,output\na,b\n"}
    commit = hub.add("datasets/org/letters", files)
    data = "hf://datasets/org/letters"
    train = [f"{data}/data/train.parquet", f"{data}/more.csv"]
    sweep.edit(data={"train": train, "validation": f"{data}@{commit}/validation.jsonl"})
    sweep.call("download")
    sweep.run("configure_all")
    folder = sweep.directory / f"downloads/datasets/org--letters@{commit[:12]}"
    assert read_files(folder) == files
    recipe = yaml.safe_load((sweep.find_training("lora_rank=4") / "recipe.yaml").read_text())
    local = [str((folder / name).relative_to(sweep.directory)) for name in ("data/train.parquet", "more.csv")]
    assert recipe["dataset"]["data_files"] == local
    columns = {"input": "input", "output": "output"}
    found = list(read_samples([str(sweep.directory / file) for file in local], "instruct", columns))
    assert [sample.messages[1].content for sample in found] == ["é"] * 8 + ["b"]
    assert sweep.plan("configure_all") == {}


def test_a_token_opens_a_gated_model_and_is_written_nowhere(sweep: Sweep, hub: Hub, model: Path) -> None:
    hub.add("models/org/gated", read_files(model), is_gated=True)
    sweep.edit(model={"path": "hf://org/gated"})
    sweep.environment["HF_TOKEN"] = TOKEN
    said = sweep.call("download")
    said += sweep.run("configure_all", "--printshellcmds", "--verbose")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in said
    assert [path for path, data in read_files(sweep.directory).items() if TOKEN.encode() in data] == []


BAD: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "gated, no token": (
        {"model": {"path": "hf://org/gated"}},
        "",
        ["model.path: hf://org/gated@", "is gated", "HF_TOKEN is not set"],
    ),
    "gated, a token for another": (
        {"model": {"path": "hf://org/gated"}},
        "hf_anotherSecret",
        ["model.path", "is gated", "the token in HF_TOKEN has no access to it"],
    ),
    "unknown": (
        {"model": {"path": "hf://org/none"}},
        "",
        ["model.path: hf://org/none@main: no such model", "HF_TOKEN"],
    ),
    "no such revision": (
        {"model": {"path": "hf://org/plain@v9"}},
        "",
        ["hf://org/plain@v9: no such revision 'v9'", "a branch, a tag or a commit"],
    ),
    "no weights": ({"model": {"path": "hf://org/empty"}}, "", ["model.path", "a model in safetensors"]),
    "no such file": (
        {"data": {"train": "hf://datasets/org/letters/tain.jsonl"}},
        "",
        ["data.train", "no such file. Expected: train.jsonl"],
    ),
    "no such baseline, named as on the hub": (
        {"evaluation": {"baselines": [{"name": "other", "model": "org/none"}]}},
        "",
        ["evaluation.baselines.0.model: hf://org/none@main"],
    ),
    "no such baseline": (
        {"evaluation": {"baselines": [{"name": "other", "model": "hf://org/none"}]}},
        "",
        ["evaluation.baselines.0.model: hf://org/none@main"],
    ),
}


@pytest.mark.parametrize("problem", BAD)
def test_what_the_hub_does_not_give_is_told_by_key_and_without_the_token(
    problem: str, sweep: Sweep, hub: Hub, model: Path
) -> None:
    sections, token, said = BAD[problem]
    hub.add("models/org/gated", read_files(model), is_gated=True)
    hub.add("models/org/empty", {"README.md": b"#"})
    hub.add("datasets/org/letters", {"train.jsonl": b"{}", "README.md": b"#"})
    sweep.environment["HF_TOKEN"] = token
    sweep.edit(**sections)
    refused = sweep.lorasweep("download", *(["--dry-run"] if not token else []))
    assert refused.returncode == 1
    for part in ["sweep.yaml", *said]:
        assert part in refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    if token:
        assert token not in refused.stdout + refused.stderr
        assert [path for path, data in read_files(sweep.directory).items() if token.encode() in data] == []


def test_a_baseline_that_is_named_as_on_the_hub_and_not_fetched_is_refused(sweep: Sweep) -> None:
    baselines = [{"name": "other", "model": "org/other"}]
    sweep.edit(model={"path": "model"}, evaluation={"baselines": baselines, "enabled": True})
    refused = sweep.snakemake("--dry-run")
    assert refused.returncode == 1
    assert "evaluation.baselines.0.model: no such directory: 'org/other'. If this model on the hub is" in refused.stderr


def test_a_hub_out_of_reach_is_told_with_what_to_do(sweep: Sweep) -> None:
    sweep.environment["HF_ENDPOINT"] = "http://127.0.0.1:1"
    refused = sweep.lorasweep("download", "--dry-run")
    assert refused.returncode == 1
    assert "model.path: hf://org/plain@main: the download failed" in refused.stderr
    assert "run 'lorasweep download' on one that has access" in refused.stderr


ASKING = """
from huggingface_hub import hf_hub_download
from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import match


@task
def asked() -> Task:
    file = hf_hub_download("org/questions", "test.jsonl", repo_type="dataset")
    return Task(dataset=json_dataset(file), scorer=match())
"""


@pytest.mark.long  # that of a model is like it
def test_what_tasks_load_from_the_hub_is_fetched_once_into_the_working_directory(
    make: Callable[..., Sweep], hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep, home = make(variables={}, plan={}), tmp_path_factory.mktemp("home")
    questions = {"test.jsonl": b'{"input": "after a", "target": "b"}\n'}
    hub.add("datasets/org/questions", questions, is_gated=True)
    (sweep.directory / "asked.py").write_text(ASKING)
    models = {"baseline": False, "baselines": [{"name": "base", "model": "model"}]}
    sweep.edit(data={"train": None}, evaluation={**models, "tasks": ["asked.py@asked"]})
    sweep.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HOME": str(home), "XDG_CACHE_HOME": ""}
    file = sweep.directory / "sweep.yaml"
    refused = sweep.snakemake()
    assert refused.returncode == 1
    assert f"{file}: evaluation.tasks.0: 'asked.py@asked' does not load: " in refused.stderr
    assert f"'lorasweep download {file}' fetches what it needs of the hub" in refused.stderr
    assert hub.requests == []
    assert "The tasks would be loaded with access to the hub: asked" in sweep.call("download", "--dry-run")
    # Of two at once, one fetches.
    other = sweep.directory / "other.yaml"
    other.write_text(yaml.safe_dump({**sweep.config, "experiment": {"name": "other"}}))
    environment = {**os.environ, **sweep.environment, "PYTHONPATH": str(ROOT / "workflow")}
    command = [sys.executable, "-m", "lorasweep", "download"]
    runs = [subprocess.Popen([*command, name], cwd=sweep.directory, env=environment) for name in (file, other)]
    assert [run.wait() for run in runs] == [0, 0]
    assert hub.count("GET", "/test.jsonl") == 1
    assert list((sweep.directory / "downloads/tasks").rglob("test.jsonl"))
    hub.requests.clear()
    assert "The tasks were loaded with access to the hub: asked" in sweep.call("download")
    assert "would be refused" not in sweep.run("--dry-run")
    (sweep.results / "task_sizes.json").unlink()
    assert "would be refused" not in sweep.call("plan", "--cores", "2")
    assert json.loads((sweep.results / "task_sizes.json").read_text())["tasks"]["asked"]["samples"] == 1
    assert hub.requests == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert [path for path, data in read_files(sweep.directory).items() if TOKEN.encode() in data] == []


def test_a_task_that_the_hub_refuses_is_told_by_its_key_and_without_the_token(
    make: Callable[..., Sweep], hub: Hub
) -> None:
    sweep = make()
    (sweep.directory / "asked.py").write_text(ASKING.replace('"dataset")', '"dataset", token="hf_anotherSecret")'))
    sweep.edit(evaluation={"tasks": ["asked.py@asked"]})
    hub.add("datasets/org/questions", {"test.jsonl": b"{}"}, is_gated=True)
    sweep.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_anotherSecret"}
    refused = sweep.lorasweep("download")
    assert refused.returncode == 1
    assert "sweep.yaml: evaluation.tasks.0: 'asked.py@asked' does not load: " in refused.stderr
    assert "gated" in refused.stderr
    assert "hf_anotherSecret" not in refused.stdout + refused.stderr
    assert not list((sweep.directory / "downloads/tasks").glob(".loaded-*"))
