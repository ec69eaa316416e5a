"""The manifest of a point is written only of an adapter that is what the point's settings say."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.sections import Controls
from lorasweep.results.manifest import describe_adapter_difference

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]}
WHOLE = {"lora_modules": "all-linear"}

ADAPTERS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, None),
    ({}, {"use_dora": False, "use_rslora": False}, None),
    ({}, {"r": 4}, "r is 4, but the point's settings say 8"),
    (
        {},
        {"target_modules": ["q_proj"]},
        "target_modules is ['q_proj'], but the point's settings say ['q_proj', 'v_proj']",
    ),
    ({"lora_alpha": "r"}, {"lora_alpha": 8.0}, None),
    ({"lora_alpha": "2r"}, {}, None),
    ({"lora_alpha": 32}, {"lora_alpha": 32.0}, None),
    ({"lora_alpha": "r"}, {}, "lora_alpha is 16, but the point's settings say 8"),
    ({"use_dora": True}, {"use_dora": True}, None),
    ({"use_dora": True}, {}, "use_dora is False, but the point's settings say True"),
    ({}, {"use_rslora": True}, "use_rslora is True, but the point's settings say False"),
    ({"init_lora_weights": "pissa_niter_4"}, {"r": 16, "lora_alpha": 32}, None),
    ({"init_lora_weights": "olora"}, {}, "r is 8, but the point's settings say 16"),
    ({"init_lora_weights": "gaussian"}, {}, None),
    (WHOLE, {"target_modules": ["c_attn"]}, None),
    (WHOLE, {"r": 4}, "r is 4, but the point's settings say 8"),
    ({"_override": {"model": {}}}, {"r": 4}, None),
]


@pytest.mark.parametrize(("keys", "saved", "difference"), ADAPTERS)
def test_an_adapter_other_than_the_settings_say_is_told(
    tmp_path: Path, keys: dict[str, Any], saved: dict[str, Any], difference: str | None
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA | saved))
    settings = Controls.model_validate(keys).model_dump(by_alias=True)
    found = describe_adapter_difference(tmp_path, settings)
    assert found == (difference and f"{tmp_path}/adapter_config.json: {difference}")
