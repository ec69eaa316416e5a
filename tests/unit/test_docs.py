"""What README and docs show can be taken as it stands: their YAML is planned, and their links lead somewhere."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasweep.experiment.loading import load_experiment
from lorasweep.experiment.roles import get_folders
from lorasweep.running.run import Places, forecast_run
from lorasweep.sweep.sweep import Sweep
from plain_checkpoint import write_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{d}/README.md" for d in ("config", "profiles")),
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
            *("train", "export", "merge", "evaluate", "evaluate_adapters")
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
    bases = {whole["model"]["path"], *find_values(baselines, "model"), *(base for base, _ in asked if base)}
    for folder in bases:
        write_checkpoint(tmp_path / folder)
    adapters = {*find_values(whole.get("runs"), "adapter"), *(adapter for _, adapter in asked if adapter)}
    for folder in adapters:
        (tmp_path / folder).mkdir(parents=True)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (tmp_path / folder / name).write_bytes(b"{}")
    for folder in ("data", "tasks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/train.jsonl").write_text('{"input": "a", "output": "b"}\n' * 1000)
    (tmp_path / "tasks/mine.py").write_text("@task\ndef mine():\n    pass\n")
    sweep = Sweep.load(whole, "shown.yaml")
    sweep.check(asks_inspect=False)
    wanted = {("cleanup", point) for point in sweep.points} | {("train", sweep.trainings[t]) for t in sweep.trainings}
    forecast = forecast_run(sweep, wanted, Places(2, None, None))
    assert forecast
    assert f"0 of {len(sweep.folders)} points done" in forecast.describe_shortly()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
