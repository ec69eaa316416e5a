"""The model card of a published point: `README.md` with the metadata that the Hugging Face hub reads."""

from collections.abc import Iterator, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader

from lorasweep.experiment.points import format_value
from lorasweep.experiment.sections import Controls
from lorasweep.layout import ADAPTER_CONFIG, CARD, EXPERIMENT, LENGTHS, TABLE, TEMPLATE_DIGEST, find_part
from lorasweep.results.publication import Base
from lorasweep.results.table import (
    CONFIDENCE,
    find_base,
    format_gain,
    format_metric,
    format_samples,
    is_metric,
)
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record

_TEMPLATES = Path(__file__).parents[2] / "report"

_LICENSE_KEYS = ("license", "license_name", "license_link")

_UNSERVED = ("use_dora", "lora_bias", "modules_to_save")
"""Features of adapters that vLLM does not apply (vllm/lora/peft_helper.py)."""


def make_card(point: Path, manifest: Mapping[str, Any], name: str, base: Base, ranks: Sequence[int]) -> str:
    """Return the card of a point.

    Args:
        point: The point's folder, in that of its experiment, whose table has the intervals and gains.
        manifest: The point's manifest.
        name: The name under which it is published.
        base: The base model, whose card tells its licence.
        ranks: The values of vLLM's `--max-lora-rank`.

    Raises:
        InputError: the table of results is of another adapter.
    """
    license = read_license(Path(base.path)) if base.path else {}
    table = _read_table(point.parent)
    scores = list(_list_scores(point, manifest, table))
    full = manifest["mode"] == "A"
    relation = "finetune" if full else "adapter"
    metadata: dict[str, Any] = {
        **({"base_model": base.name, "base_model_relation": relation} if base.is_on_hub else {}),
        "library_name": "transformers" if full else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lorasweep", "lora", *([f"base_model:{relation}:{base.name}"] if base.is_on_hub else [])],
        **{key: license[key] for key in _LICENSE_KEYS if key in license},
    }
    if scores:
        results = [_make_result(task, own) for task, own in _group(scores)]
        metadata["model-index"] = [{"name": name, "results": results}]
    config = find_record(find_part(point, "adapter") / ADAPTER_CONFIG)
    rank = max([config.get("r", 0), *(config.get("rank_pattern") or {}).values()])
    unserved = [key for key in _UNSERVED if config.get(key)] + (
        ["bias"] if config.get("bias", "none") != "none" else []
    )
    evaluation, training = manifest["evaluation"], manifest["training"]
    is_adopted = "adopted_from" in training
    # The values were checked before they were recorded.
    controls = Controls.model_construct(**manifest["settings"])
    # PiSSA and OLoRA are saved with another rank and alpha than they were trained with.
    alpha = controls.alpha if controls.changes_base and not is_adopted else config.get("lora_alpha")
    settings = {**manifest["settings"], "lora_alpha": alpha}
    settings = {k: v for k, v in settings.items() if v not in (None, {}, []) and k not in ("adapter", "model_format")}
    # Records leave out what does not apply, which is then undefined.
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), trim_blocks=True)
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", "<br>")
    return environment.get_template("card.md.jinja").render(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        name=name,
        base=base,
        license=license,
        full=full,
        manifest=manifest,
        settings={key: format_value(value, key) for key, value in sorted(settings.items())},
        training=training,
        is_adopted=is_adopted,
        samples=None if is_adopted else _count_samples(point.parent, manifest),
        scores=scores,
        confidence=table.attrs[CONFIDENCE],
        spec=evaluation.get("spec") or {},
        dtype={"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[manifest["dtype"]],
        served_rank=next((limit for limit in ranks if rank <= limit), None),
        unserved=unserved,
        # Earlier versions recorded that of the clean-up.
        revision=evaluation.get("git_revision") or manifest["git_revision"],
        own_template=TEMPLATE_DIGEST in training,
        # Earlier versions adopted adapters without one.
        has_tokenizer=any("token" in file.name for file in find_part(point, "adapter").iterdir()),
    )


def read_license(base: Path) -> dict[str, str]:
    """Return what the card of a base model says of its licence: `license`, and with it `license_name` and `_link`.

    {} if it has no card, or its card says nothing.
    """
    card = base / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if not text.startswith("---\n"):
        return {}
    try:
        metadata = yaml.safe_load(text.split("---\n", 2)[1])
    except yaml.YAMLError:
        return {}
    said = metadata if isinstance(metadata, dict) else {}
    return {key: str(said[key]) for key in _LICENSE_KEYS if isinstance(said.get(key), str)} if "license" in said else {}


def _read_table(results: Path) -> pd.DataFrame:
    """Return the table of results, empty if there is none, with the level of its intervals."""
    file, experiment = (results / TABLE).with_suffix(".parquet"), results / EXPERIMENT
    table = pd.read_parquet(file) if file.is_file() else pd.DataFrame(columns=["point", "task", "adapter_sha256"])
    if CONFIDENCE not in table.attrs:  # of an earlier version
        said = yaml.safe_load(experiment.read_text(encoding="utf-8")) if experiment.is_file() else {}
        table.attrs[CONFIDENCE] = float((said.get("report") or {}).get("confidence", 0.95))
    return table


def _list_scores(point: Path, manifest: Mapping[str, Any], table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield each metric of each task, with what the table says of its interval and its gain."""
    own_base = find_base(manifest["settings"])
    for task, result in manifest["evaluation"].get("tasks", {}).items():
        of_task = table[table["task"] == task]
        own, base = (of_task[of_task["point"] == name] for name in (point.name, own_base))
        if len(own) and not _is_row_of(own.iloc[0], manifest):
            problem = f"the row of {point.name} is of another adapter or evaluation; run the experiment again"
            raise InputError(problem, file=(point.parent / TABLE).with_suffix(".parquet"))
        for metric, value in filter(lambda pair: is_metric(pair[0]), result["scores"].items()):
            row = {metric: value, "samples": result["samples"]} | (own.iloc[0].to_dict() if len(own) else {})
            p_value = row.get(f"{metric}:p_adjusted")
            yield {
                "task": task,
                "metric": metric,
                "value": value,
                "shown": format_metric(row, metric),
                "base": f"{base.iloc[0][metric]:.3f}" if len(base) and pd.notna(base.iloc[0][metric]) else "",
                "gain": format_gain(row, metric),
                "p": "" if p_value is None or pd.isna(p_value) else f"{p_value:.2g}",
                "samples": format_samples(row, [metric]),
            }


def _is_row_of(row: "pd.Series[Any]", manifest: Mapping[str, Any]) -> bool:
    digests = {"adapter_sha256": manifest["adapter_sha256"]}
    digests["evaluation_sha256"] = manifest["evaluation"].get("evaluation_sha256")
    return all(row.get(key) == digest for key, digest in digests.items() if digest)


def _group(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    tasks = dict.fromkeys(score["task"] for score in scores)
    return [(task, [score for score in scores if score["task"] == task]) for task in tasks]


def _make_result(task: str, scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a task's entry of `model-index` (https://huggingface.co/docs/hub/model-cards)."""
    metrics = [
        {"type": score["metric"].rpartition("/")[2], "name": score["metric"], "value": float(score["value"])}
        for score in scores
    ]
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": task, "type": task},
        "metrics": metrics,
    }


def _count_samples(results: Path, manifest: Mapping[str, Any]) -> int | None:
    """Return the number of samples that a point was trained on, as the plan counted them; `None` if it did not.

    The counts of more samples of its data are those of its own too.
    """
    most, data = manifest["settings"].get("max_samples"), manifest["training"].get("data_sha256")
    counts = [entry for entry in find_record(results / LENGTHS).get("counts", []) if entry["key"][0] == data]
    counted = [entry for entry in counts if (entry.get("max_samples") or inf) >= (most or inf)]
    found = {len(entry["parts"]["train"][:most]) for entry in counted if "parts" in entry}
    return found.pop() if len(found) == 1 else None
