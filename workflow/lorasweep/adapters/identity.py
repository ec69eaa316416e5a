"""What an adapter is known by: its weights and, of one that was not trained here, its configuration.

The settings of a training, which its recipe has, decide the configuration of an adapter that was trained here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasweep.layout import ADAPTER_CONFIG
from lorasweep.util.digest import digest_text
from lorasweep.util.files import find_record

HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    # A flag that PEFT corrects by the type of the module, and initializations that leave the base model unchanged.
    *("fan_in_fan_out", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
}
"""Keys of the configuration that do not affect the merged weights."""


def digest_config(adapter: Path) -> str:
    """Return the sha256 of what an adapter's configuration says of its effect, however that is written."""
    config = find_record(adapter / ADAPTER_CONFIG)
    effect = {key: _plain(value) for key, value in config.items() if value and key not in HARMLESS}
    # Those that leave the base model unchanged have no effect after the training, but for one (see `read_adapter`).
    if effect.get("init_lora_weights") != "mica":
        effect.pop("init_lora_weights", None)
    return digest_text(json.dumps(effect, sort_keys=True))


def _plain(value: Any) -> Any:
    """Return a value as it is compared: PEFT writes sets of names in any order, and 16 may be 16.0."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted(map(_plain, value), key=str)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def identify_adapter(record: Mapping[str, Any]) -> dict[str, str]:
    """Return what the results of an adapter have on record of it, by the adapter's own record; {} without one.

    `adapter_sha256` is the digest of its weights, `adapter_config_sha256` that of an adopted adapter's configuration.
    What earlier versions adopted lacks the latter.
    """
    adopted = {"adapter_sha256": "adopted_sha256", "adapter_config_sha256": "adopted_config_sha256"}
    trained = {"adapter_sha256": str(record["adapter_sha256"])} if "adapter_sha256" in record else {}
    return trained | {key: str(record[name]) for key, name in adopted.items() if name in record}
