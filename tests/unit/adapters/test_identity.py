"""What of an adapter's configuration makes it another adapter."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.adapters.identity import digest_config

CONFIG: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {}}

ALIKE: list[dict[str, Any]] = [
    {"target_modules": ["v_proj", "q_proj"]},
    {"lora_alpha": 16.0},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": True, "lora_dropout": 0.1, "peft_version": "0.1"},
    {"use_dora": False, "base_model_name_or_path": "elsewhere"},
]
OTHERS: list[dict[str, Any]] = [
    {"lora_alpha": 32},
    {"use_rslora": True},
    {"target_modules": ["q_proj"]},
    {"rank_pattern": {"q_proj": 4}},
    {"init_lora_weights": "mica"},
]


def digest(folder: Path, config: dict[str, Any]) -> str:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return digest_config(folder)


@pytest.mark.parametrize("config", ALIKE)
def test_how_it_is_written_makes_no_other_adapter(tmp_path: Path, config: dict[str, Any]) -> None:
    assert digest(tmp_path, config) == digest(tmp_path, {})


@pytest.mark.parametrize("config", OTHERS)
def test_what_changes_the_update_makes_another_adapter(tmp_path: Path, config: dict[str, Any]) -> None:
    assert digest(tmp_path, config) != digest(tmp_path, {})
