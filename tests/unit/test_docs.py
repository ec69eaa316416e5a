"""What README and docs show can be taken as it stands: their YAML is planned, their links lead somewhere, and the site
is made of them without a warning."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.roles import get_folders
from lorasweep.experiment.sections import AnyTask, Experiment, Section
from lorasweep.running.run import Places, forecast_run
from lorasweep.sweep.sweep import Sweep
from made_results import METRIC, collect, make_results
from plain_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{d}/README.md" for d in ("config", "profiles")),
    *sorted((ROOT / "tests").rglob("*.md")),
]


EXPERIMENT: dict[str, Any] = {
    "experiment": {"name": "shown"},
    "variables": {"seed": [0]},
    "model": {"path": "models/base"},
    "data": {"train": "data/train.jsonl"},
    "evaluation": {"tasks": ["tasks/mine.py@mine"]},
}
"""What a part of an experiment is laid into."""


def list_blocks(page: Path) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [(page, number, block) for page in PAGES for number, block in enumerate(list_blocks(page), 1)]


def find_values(value: Any, key: str) -> Iterator[str]:
    """The texts that stand under a key, wherever."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if name == key and isinstance(part, str):
            yield part
        yield from find_values(part, key)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}") for page, number, block in BLOCKS]
)
def test_blocks_of_yaml_are_planned(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = yaml.safe_load(block)
    if "default-resources" in shown:  # a profile of Snakemake's
        assert {name.partition(":")[0] for name in shown["set-resources"]} <= {
            *("train", "train_part", "prune", "choose_epoch", "export", "merge", "evaluate", "evaluate_adapters")
        }
        return
    whole = (
        shown
        if "experiment" in shown
        else EXPERIMENT
        | {
            key: {**EXPERIMENT.get(key, {}), **part} if isinstance(part, dict) and key != "variables" else part
            for key, part in shown.items()
        }
    )
    if "hf://" in block:  # which is fetched before
        assert load_experiment(whole, "shown.yaml")
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    roles = load_experiment(whole, "shown.yaml").evaluation.model_roles.values()
    asked = [get_folders(role.model, role.args) for role in roles]
    baselines = (whole.get("evaluation") or {}).get("baselines")
    models = [*find_values(whole["model"], "path"), *find_values(whole.get("models"), "path")]
    bases = {*models, *find_values(baselines, "model"), *(base for base, _ in asked if base)}
    for folder in bases:
        write_checkpoint(tmp_path / folder)
    adapters = {*find_values(whole.get("runs"), "adapter"), *(adapter for _, adapter in asked if adapter)}
    for folder in adapters:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / folder / name).write_bytes(b"{}")
    for file in {"data/train.jsonl", *re.findall(r"[\w/]+\.jsonl", block)}:
        write(tmp_path / file, '{"input": "a", "output": "b"}\n' * 1000)
    for file in re.findall(r"[\w/]+\.jinja", block):
        write(tmp_path / file, "{{ messages }}")
    for file, task in {("tasks/mine.py", "mine"), *re.findall(r"([\w/]+\.py)@(\w+)", block)}:
        write(tmp_path / file, f"@task\ndef {task}(**options):\n    pass\n")
    sweep = Sweep.load(whole, "shown.yaml")
    sweep.check(asks_inspect=False)
    wanted = {("cleanup", point) for point in sweep.points} | {("train", sweep.trainings[t]) for t in sweep.trainings}
    forecast = forecast_run(sweep, wanted, Places(2, None, None))
    assert forecast
    assert f"0 of {len(sweep.folders)} points done" in forecast.describe_shortly()


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    assert [file for file, _ in links if not (page.parent / file).exists()] == []
    targets = [(page.parent / file if file else page, anchor) for file, anchor in links if anchor]
    assert [(str(target), anchor) for target, anchor in targets if anchor not in list_anchors(target)] == []


def test_every_section_of_an_experiment_has_its_table() -> None:
    headings = re.findall(
        r"^## `([\w.]+)`$", (ROOT / "config/README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    sections = {section.__name__ for section in Section.__subclasses__()} - {Experiment.__name__, AnyTask.__name__}
    sections |= {section.__name__ for section in AnyTask.__subclasses__()}
    assert len(headings) == len(set(headings)) == len(sections)
    assert {"report", "evaluation.tasks", "plan.devices"} <= set(headings)


def test_every_column_of_the_table_of_results_is_described(tmp_path: Path) -> None:
    variables = {"lora_rank": [4, 8], "seed": [0, 1]}
    make_results(tmp_path, variables, lambda settings: 0.5)
    collect(tmp_path, list(variables))
    described = set(re.findall(r"`([^`]+)`", (ROOT / "docs/reference/columns.md").read_text(encoding="utf-8")))
    described |= {name.removeprefix("...") for name in described}
    written = {METRIC: "<score>/<metric>", "match/stderr": "<score>/stderr", "lora_rank": "point"}
    columns = [written.get(column, column.removeprefix(METRIC)) for column in pd.read_csv(tmp_path / "results.csv")]
    assert [column for column in columns if re.sub(r"^\w+_seconds$", "<rule>_seconds", column) not in described] == []


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", str(ROOT / "docs")]
    command += ["-d", str(tmp_path / "read"), str(ROOT), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    pages = [page.relative_to(ROOT) for page in PAGES if "tests" not in page.parts]
    assert [str(page) for page in pages if not (tmp_path / "site" / page.with_suffix(".html")).is_file()] == []
    first = (tmp_path / "site/docs/index.html").read_text(encoding="utf-8")
    assert 'href="tutorial.html"' in first
    assert (tmp_path / "site/docs/demo.svg").is_file()


def test_a_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"]["text"])
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert f"## [{project['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
