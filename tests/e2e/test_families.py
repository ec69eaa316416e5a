"""Families of models, and ways to adapt them, that the trainer `trl` promises: each is a real sweep of a tiny model."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import pytest

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.checkpoints.sizes import get_adapter_size
from lorasweep.experiment.sections import Controls
from lorasweep.trainers.training_log import read_log
from sweep import MODES, POINTS, Sweep, make_sweep, run_stage

FAMILIES = (
    *("llama3", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi4", "mistral", "mixtral"),
    *("olmo2", "smollm3", "granite", "gpt_neox", "gpt2"),
)

ATTENTION_OF_MIXTRAL = ["q_proj", "k_proj", "v_proj", "o_proj"]
"""Its experts are parameters, and no layers."""

CONTROLS: dict[str, Any] = {"epochs": 4, "batch_size": 5, "lr": 4e-3, "lora_rank": 4, "lora_modules": "all-linear"}

EVALUATION = {"max_tokens": 8, "baseline": False, "tasks": [{"task": "tasks.py@letters", "limit": 2}]}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "loraplus": {"loraplus_lr_ratio": 16, "lr": 1e-3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "whole_head": {"modules_to_save": ["lm_head"]},
    "embedding": {"lora_modules": ["embed_tokens", "q_proj"]},
    "embedding_alone": {"lora_modules": ["embed_tokens"]},
    "pattern": {"lora_modules": {"regex": r"model\.layers\.[02]\..*_proj"}},
    "translated": {"lora_modules": None, "lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True},
    "adafactor": {"optimizer": "adafactor"},
    "linear": {"schedule": "linear", "warmup_ratio": 0.1},
    "constant": {"schedule": "constant", "warmup_ratio": 0.1},
    "alpha_r": {"lora_alpha": "r"},
}
"""What each run of a sweep changes. The head of the model is not tied."""

MakeFamily = Callable[..., Sweep]


@pytest.fixture(scope="module")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> MakeFamily:
    """Make a sweep of a tiny model of a family, which nothing has run yet."""

    def make(family: str, **sections: Any) -> Sweep:
        folder = tmp_path_factory.mktemp(family.replace(".", "_"))
        run_stage("eval", "tiny_model.py", "--family", family, "--output", folder / "made")
        said = {"trainer": "trl", "controls": CONTROLS, "evaluation": EVALUATION, **sections}
        return make_sweep(folder / "sweep", folder / "made", "families", **said)

    return make


def read_table(sweep: Sweep) -> pd.DataFrame:
    return pd.read_csv(sweep.results / "results.csv").set_index("point")


def read_completions(sweep: Sweep, points: Iterable[str]) -> list[dict[str, str]]:
    files = [sweep.results / point / "eval/letters.eval" for point in points]
    read = json.loads(run_stage("eval", "e2e/read_logs.py", *files))
    return [read[str(file)]["completions"] for file in files]


def check_that_modes_agree(sweep: Sweep, points: Iterable[str]) -> None:
    """The points are one adapter in several modes: their rows and answers are the same."""
    names = [*points]
    rows = read_table(sweep).loc[names]
    metrics = [column for column in rows.columns if "/" in column]
    assert "match/accuracy" in metrics
    for column in [*metrics, "adapter_sha256", "base_model_fingerprint", "probe_distance"]:
        assert rows[column].notna().all(), column
        assert rows[column].nunique() == 1, rows[column]
    assert (rows["probe_distance"] > 0).all()
    assert rows["merged_weights_sha256"].nunique() <= 1  # B2 writes no model
    completions = read_completions(sweep, names)
    assert len(completions[0]) == 2
    assert all(said == completions[0] for said in completions)


def check_adapter(sweep: Sweep, point: str, **changes: Any) -> None:
    """The loss of a point's training has fallen, and its adapter is as large as it was planned, to the byte."""
    adapter = sweep.results / point / "adapter"
    rows = read_log(adapter / "training_log.csv")
    assert len(rows) == 5 * CONTROLS["epochs"]
    assert sum(row.loss for row in rows[-5:]) < sum(row.loss for row in rows[:5])
    controls = Controls.model_validate({**sweep.config["controls"], **changes})
    planned = get_adapter_size(read_checkpoint(sweep.directory / "model"), controls, "fp32")
    assert (adapter / "adapter_model.safetensors").stat().st_size == planned


def read_record(sweep: Sweep, point: str) -> dict[str, Any]:
    return dict(json.loads((sweep.results / point / "adapter/lorasweep.json").read_text()))


@pytest.mark.long  # test_quantized.py says so of one family, tests/unit of the plan of each
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_is_the_same_in_every_mode_and_is_planned_to_the_byte(
    make_family: MakeFamily, family: str
) -> None:
    sweep = make_family(family, **MODES)
    if family == "mixtral":
        sweep.edit(controls={"lora_modules": ATTENTION_OF_MIXTRAL})
    sweep.run()
    check_that_modes_agree(sweep, POINTS.values())
    for point in POINTS.values():
        check_adapter(sweep, point)
    record = read_record(sweep, POINTS["A"])
    assert (record["trainer"], record["steps"]) == ("trl", 5 * CONTROLS["epochs"])
    assert "quantize" not in record
    assert sweep.plan() == {}


@pytest.mark.long  # tests/unit says so of the names
@pytest.mark.parametrize("modules", ["all-linear", ["q_proj", "gate_up_proj"]])
def test_experts_that_are_no_layers_are_refused_by_name_before_any_job(
    make_family: MakeFamily, modules: str | list[str]
) -> None:
    sweep = make_family("mixtral", **MODES)
    sweep.edit(controls={"lora_modules": modules})
    refused = sweep.snakemake()
    said = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert "controls.lora_modules" in said
    assert "gate_up_proj" in said
    assert "q_proj" in said  # what would be accepted
    assert "Traceback" not in said
    assert not list(sweep.results.glob("trainings/*/recipe.yaml"))


@pytest.mark.long
def test_every_way_to_adapt_is_trained_is_the_same_merged_or_not_written_and_is_planned_to_the_byte(
    make_family: MakeFamily,
) -> None:
    runs = [
        {"name": f"{name}_{mode}", "mode": mode, **changes}
        for name, changes in VARIANTS.items()
        for mode in ("B1", "B2")
    ]
    sweep = make_family("llama3", runs=runs)
    sweep.run()
    for name, changes in VARIANTS.items():
        points = [f"{name}_B1", f"{name}_B2"]
        check_that_modes_agree(sweep, points)
        for point in points:
            check_adapter(sweep, point, **changes)
    # None of them is silently another: all adapters differ.
    assert read_table(sweep)["adapter_sha256"].nunique() == len(VARIANTS)
    logs = {name: read_log(sweep.results / f"{name}_B1/adapter/training_log.csv") for name in VARIANTS}
    lr, steps = CONTROLS["lr"], 5 * CONTROLS["epochs"]
    assert logs["linear"][0].lr < lr
    assert logs["linear"][2].lr == pytest.approx(lr)
    assert logs["linear"][-1].lr == pytest.approx(lr / (steps - 2), rel=1e-5)  # the log has six digits
    assert [row.lr for row in logs["constant"][2:]] == pytest.approx([lr] * (steps - 2))
    assert logs["alpha_r"][0].loss == logs["plain"][0].loss  # B is 0
