"""The manifest of a point is written only of an adapter that is what the point's settings say."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.experiment.sections import Controls
from lorasweep.results.manifest import clean_up, describe_adapter_difference
from lorasweep.util.digest import digest_text
from lorasweep.util.errors import InputError
from lorasweep.util.files import write_record

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


def test_an_empty_file_is_kept_where_the_merge_wrote_it_so_and_refused_elsewhere(tmp_path: Path) -> None:
    """A base model that brings its own code can have an empty `__init__.py`."""
    point = tmp_path / "point"
    files = {"adapter/adapter_model.safetensors": "a", "hf_model/config.json": "{}", "hf_model/__init__.py": ""}
    for name, text in files.items():
        (point / name).parent.mkdir(parents=True, exist_ok=True)
        (point / name).write_text(text)
    sha256 = {Path(name).name: digest_text(text) for name, text in files.items() if name.startswith("hf_model")}
    write_record(point / "hf_model/lorasweep.json", {"sha256": sha256})
    settings = {"mode": "A", "dtype": "fp32", "device": "cpu", "adapter": "theirs"}
    clean_up(point, settings, [], tmp_path / "benchmarks")
    assert "hf_model/__init__.py" in (point / "manifest.json").read_text()
    (point / "hf_model/config.json").write_text("")
    with pytest.raises(InputError, match=r"config\.json: the file is missing or empty"):
        clean_up(point, settings, [], tmp_path / "benchmarks")
