"""Print, as JSON, the tokens that evaluations hand to the model for each sample of a file, in its order.

The argument is a JSON file: a list of evaluations, each with `spec`, its specification; `file`, the samples; `logs`, a
folder for its logs; and optionally `provider`, which is `lorasweep` instead of `hf`; `adapter`, a folder to make an
adapter of the base in, which is merged for `hf`; `own`, a system message that the task brings. An evaluation that is
refused has the message instead.
"""

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser
from inspect_ai.model._providers import hf
from inspect_ai.solver import generate, system_message
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lorasweep.evaluation.provider  # noqa: F401
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.evaluate import make_model
from lorasweep.evaluation.inspect_tasks import make_options, with_prompt
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.evaluation.system_messages import find_system_message

MESSAGES = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}

# The provider looks for an answer once a second.
hf.anyio = SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.02))


def read(line: str) -> Any:
    sample = json.loads(line)
    if "conversations" in sample:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        return [MESSAGES[roles[m["from"]]](content=m["value"]) for m in sample["conversations"][:-1]]
    if "instruction" in sample:
        return "\n\n".join(filter(None, [sample["instruction"], sample["input"]]))
    if "input" in sample:
        return sample["input"]
    return [MESSAGES[m["role"]](content=m["content"]) for m in sample["messages"][:-1]]


def make_adapter(base: Path, folder: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(folder)


def open_model(spec: EvaluationSpec, provider: str, adapter: str | None) -> Any:
    base = read_checkpoint(Path(spec.base_model), spec.chat_template)
    if adapter and not Path(adapter).is_dir():
        make_adapter(base.path, Path(adapter))
    if provider == "lorasweep":
        return make_model(
            spec, "lorasweep/prompts", base, base=str(base.path), **({"adapter": adapter} if adapter else {})
        )
    full = base.path
    if adapter:
        full = Path(f"{adapter}-{spec.mode}")
        if not full.is_dir():
            merge(base.path, Path(adapter), full, spec.dtype, temporary=spec.mode == "B1")
    return make_model(spec, "hf/prompts", base, model_path=str(full))


def read_prompts(case: dict[str, Any]) -> list[list[int]] | str:
    spec = EvaluationSpec.model_validate(case["spec"])
    model = open_model(spec, case.get("provider", "hf"), case.get("adapter"))
    inputs = [read(line) for line in Path(case["file"]).read_text().splitlines()]
    seen: list[list[int]] = []
    asked = model.api.base._model if hasattr(model.api, "base") else model.api.model
    generate_tokens = asked.generate

    def record(input_ids: Any, attention_mask: Any, **arguments: Any) -> Any:
        for tokens, kept in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            seen.append([token for token, keep in zip(tokens, kept, strict=True) if keep])
        return generate_tokens(input_ids=input_ids, attention_mask=attention_mask, **arguments)

    asked.generate = record
    own = [system_message(case["own"])] if case.get("own") else []
    (entry,) = spec.tasks
    task = with_prompt(
        spec, entry, Task(dataset=[Sample(input=i, target="") for i in inputs], solver=[*own, generate()])
    )
    place = find_system_message(task)
    options = make_options(spec, entry, model)
    [log] = eval(task, model=model, display="none", log_dir=case["logs"], max_samples=1, ctl_server=False, **options)
    asked.generate = generate_tokens
    # What is found in the task before any job is what an evaluation would refuse.
    refused = "brings a system message" in str(log.error and log.error.message)
    assert refused == (place is not None and entry.system_prompt is None), (place, log.error)
    if log.status != "success":
        return str(log.error.message)
    return seen


print(json.dumps([read_prompts(case) for case in json.loads(Path(sys.argv[1]).read_text())]))
