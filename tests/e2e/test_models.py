"""Two base models of different families, trainers and precision in one sweep."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.util.digest import digest_file
from sweep import SUMMED_UP, Sweep, run_stage

pytestmark = pytest.mark.long  # tests/unit says what each point has; this is that it is used

MODELS = ("llama", "qwen")


def name_point(model: str, mode: str) -> str:
    return f"mode={mode}__model={model}"


@pytest.fixture(scope="module")
def sweep(make: Callable[..., Sweep], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    qwen = tmp_path_factory.mktemp("model") / "qwen"
    run_stage("train", "tiny_model.py", "--output", qwen, "--family", "qwen2")
    sweep = make("models", variables={"model": list(MODELS), "mode": ["A", "B1", "B2"]})
    sweep.edit(
        model={"path": None},
        models={"llama": {"path": str(model)}, "qwen": {"path": str(qwen), "dtype": "bf16", "trainer": "trl"}},
        controls={"lora_rank": 4},
        plan={"count": True},
    )
    trainings = {"configure": 2, "train": 2, "take": 6, "export": 2, "merge": 2}
    assert sweep.plan() == {**trainings, "evaluate": 6, "evaluate_adapters": 2, "publish": 2, "cleanup": 8, **SUMMED_UP}
    sweep.run()
    assert sweep.plan() == {}
    return sweep


def test_all_modes_agree_on_each_model_and_gains_are_over_its_own_base(sweep: Sweep) -> None:
    table = pd.read_csv(sweep.results / "results.csv").set_index("point")
    models = {name: entry["path"] for name, entry in sweep.config["models"].items()}
    for model, path in models.items():
        points = [name_point(model, mode) for mode in ("A", "B1", "B2")]
        base = f"baseline__model={model}"
        assert set(table.loc[[*points, base], "model"]) == {model}
        assert set(table.loc[points, "base_model_fingerprint"]) == {read_checkpoint(Path(path)).fingerprint}
        assert table.loc[points, "match/accuracy"].nunique() == 1
        assert table.loc[points, "merged_weights_sha256"].nunique() == 1
        gains = table.loc[points, "match/accuracy"] - table.loc[base, "match/accuracy"]
        assert table.loc[points, "match/accuracy:delta"].tolist() == pytest.approx(gains.tolist())
        manifests = [json.loads((sweep.results / name / "manifest.json").read_text()) for name in (*points, base)]
        assert {m["dtype"] for m in manifests} == {"bf16" if model == "qwen" else "fp32"}
        assert {m["training"].get("trainer") for m in manifests[:3]} == {"trl" if model == "qwen" else "torchtune"}
    assert (table["match/accuracy:delta"].dropna() > 0).any()
    assert "match their manifests and the experiment" in sweep.call("verify")
    page = (sweep.results / "report.html").read_text()
    assert all(said in page for said in ("baseline", "model=llama", "model=qwen"))


def test_the_plan_has_the_size_of_each(sweep: Sweep) -> None:
    sweep.call("plan", "--cores", "2")
    plan = json.loads((sweep.results / "plan.json").read_text())
    planned = {point["name"]: point for point in plan["points"]}
    assert plan["tokens_are_counted"] is True
    for model in MODELS:
        for mode in ("A", "B1", "B2"):
            name = name_point(model, mode)
            manifest = json.loads((sweep.results / name / "manifest.json").read_text())
            adapter = (sweep.results / name / "adapter/adapter_model.safetensors").stat().st_size
            full = planned[name]["kept_bytes_by_mode"]["A"] - planned[name]["kept_bytes_by_mode"]["B1"]
            assert planned[name]["kept_bytes"] > adapter
            if mode == "A":
                kept = [file["bytes"] for file in manifest["files"] if file["path"].startswith("hf_model/")]
                assert full == pytest.approx(sum(kept), rel=0.02)


def test_an_edit_of_one_model_trains_its_points_alone(sweep: Sweep) -> None:
    llama = [name_point("llama", mode) for mode in ("A", "B1", "B2")]
    times = {name: (sweep.results / name / "manifest.json").stat().st_mtime_ns for name in llama}
    adapters = {name: digest_file(sweep.results / name / "adapter/adapter_model.safetensors") for name in llama}
    models = sweep.config["models"]
    sweep.edit(models={**models, "qwen": {**models["qwen"], "dtype": "fp32"}})
    three = {"take": 3, "evaluate": 3, "cleanup": 4}
    one = dict.fromkeys(("configure", "train", "export", "merge", "evaluate_adapters", "publish"), 1)
    assert sweep.plan() == {**one, **three, **SUMMED_UP}
    sweep.run()
    assert sweep.plan() == {}
    assert times == {name: (sweep.results / name / "manifest.json").stat().st_mtime_ns for name in times}
    assert adapters == {name: digest_file(sweep.results / name / "adapter/adapter_model.safetensors") for name in llama}
