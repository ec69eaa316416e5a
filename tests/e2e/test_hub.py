"""A sweep of a model and data on the hub: its jobs ask no hub, and none has the token."""

import json
from pathlib import Path

import pytest

from hub_server import TOKEN, read_files, serve
from sweep import SUMMED_UP, Sweep, make_sweep

CHECK = """
import os
if os.environ["HF_HUB_OFFLINE"] == "1":  # not `lorasweep download`, which loads the task too
    assert "HF_TOKEN" not in os.environ, "a job has the token"
"""


@pytest.mark.long  # tests/workflow says so of the download
def test_a_gated_model_is_trained_and_evaluated_by_jobs_without_the_token(
    tmp_path: Path, model: Path, other_model: Path
) -> None:
    sweep: Sweep = make_sweep(tmp_path / "sweep", model, "hub")
    with serve() as hub:
        hub.add("models/org/tiny", read_files(sweep.directory / "model"), is_gated=True)
        hub.add("models/org/other", read_files(other_model))
        hub.add("datasets/org/letters", {"train.jsonl": (sweep.directory / "train.jsonl").read_bytes()}, is_gated=True)
        tasks = (sweep.directory / "tasks.py").read_text()
        (sweep.directory / "tasks.py").write_text(CHECK + tasks)
        sweep.edit(
            runs=[{"name": "merged"}],
            model={"path": "hf://org/tiny"},
            data={"train": "hf://datasets/org/letters/train.jsonl"},
            controls={"epochs": 1},
            evaluation={
                "tasks": [{"task": "tasks.py@letters", "limit": 1}],
                "baseline": False,
                "baselines": [{"name": "other", "model": "hf://org/other"}],
            },
        )
        sweep.environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        said = sweep.call("download")
        hub.requests.clear()
        said += sweep.run("--printshellcmds", "--verbose", "--until", "cleanup")
        assert hub.requests == []
        assert sweep.plan() == SUMMED_UP
    assert TOKEN not in said
    assert [path for path, data in read_files(sweep.directory).items() if TOKEN.encode() in data] == []
    assert {file.parent.name for file in sweep.results.glob("*/manifest.json")} == {"merged", "other"}
    config = json.loads((sweep.results / "merged/adapter/adapter_config.json").read_text())
    commit = hub.repositories["models/org/tiny"].branches["main"]
    assert config["base_model_name_or_path"] == str(sweep.directory / f"downloads/org--tiny@{commit[:12]}")
