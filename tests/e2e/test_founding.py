"""The two example experiments of the document that lorasweep was founded on, as it writes them, on its base model.

The hub is one of the tests, and the model that it serves a tiny one. What the document leaves out is added: a name,
ranks, data, tasks.
"""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from hub_server import read_files, serve
from sweep import Sweep

MODEL = "meta-llama/Llama-3.1-8B"

FULL = """\
# experiment.yaml

controls:
  _override:
    checkpointer:
      _component_: torchtune.training.FullModelHFCheckpointer
      checkpoint_dir: ${output_dir}/checkpoints
      output_dir: ${output_dir}/hf_model
      # save_adapter_weights_only: False (default)

evaluation:
  model_format: "hf"  # HuggingFace full model
"""

ADAPTER = """\
# experiment.yaml

controls:
  _override:
    checkpointer:
      _component_: torchtune.training.FullModelHFCheckpointer
      checkpoint_dir: ${output_dir}/checkpoints
      output_dir: ${output_dir}/adapter
      save_adapter_weights_only: True  # KEY: Only save adapter

evaluation:
  enabled: true
  model_format: "adapter"  # Changed from "hf"
  base_model: "meta-llama/Llama-3.1-8B"  # Base model for loading adapters

  # Choose evaluation strategy:
  merge_adapters: True   # Merge before eval (simple, more temp storage)
  # OR
  # merge_adapters: False  # Load directly (advanced, minimal storage)
"""


@pytest.mark.long  # test_modes.py runs the same rules in each mode
@pytest.mark.parametrize(
    ("text", "mode"), [pytest.param(FULL, "A", id="full"), pytest.param(ADAPTER, "B1", id="adapter")]
)
def test_an_example_runs_as_it_is_written(make: Callable[..., Sweep], model: Path, text: str, mode: str) -> None:
    sweep = make(f"founding_{mode}", variables={"lora_rank": [8, 16]})
    sweep.edit(**yaml.safe_load(text))
    sweep.edit(model={"path": MODEL}, controls={"epochs": 1})
    with serve() as hub:
        commit = hub.add(f"models/{MODEL}", read_files(model))
        sweep.environment["HF_ENDPOINT"] = hub.url
        said = sweep.call("download", "--dry-run")
        assert f"  hf://{MODEL}@main: {len(read_files(model))} files, " in said
        assert not (sweep.directory / "downloads").exists()
        assert f"run: lorasweep download {sweep.directory / 'sweep.yaml'}" in sweep.run("--dry-run")
        sweep.call("download")
        hub.requests.clear()
        sweep.run("--set-threads", "train=1")
        assert hub.requests == []
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    points = ["lora_rank=8", "lora_rank=16"]
    assert dict(table["mode"]) == {**dict.fromkeys(points, mode), "baseline": "base"}
    assert table["match/accuracy"].notna().all()
    assert (table.loc[points, "probe_distance"] > 0).all()
    kept = {"recipe.yaml", "adapter", "eval", "manifest.json", *(["hf_model"] if mode == "A" else [])}
    for point in points:
        assert {entry.name for entry in (sweep.results / point).iterdir()} == kept
    assert [path.name for path in (sweep.directory / "downloads").glob("[!.]*--*")] == [
        f"{MODEL.replace('/', '--')}@{commit[:12]}"
    ]
