"""Print, as JSON, the tokens that evaluations hand to the model for each sample of a file, in its order.

The arguments are, for each evaluation: its specification, the file, and a folder for its logs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser
from inspect_ai.solver import generate

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.evaluate import make_model
from lorasweep.evaluation.inspect_tasks import make_options, with_prompt
from lorasweep.evaluation.spec import EvaluationSpec

messages = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def read(line: str) -> Any:
    sample = json.loads(line)
    if "input" in sample:
        return sample["input"]
    return [messages[m["role"]](content=m["content"]) for m in sample["messages"][:-1]]


def read_prompts(specification: str, file: str, logs: str) -> list[list[int]]:
    spec = EvaluationSpec.model_validate_json(specification)
    base = read_checkpoint(Path(spec.base_model))
    model = make_model(spec, "hf/prompts", base, model_path=str(base.path))
    inputs = [read(line) for line in Path(file).read_text().splitlines()]
    seen: list[list[int]] = []
    generate_tokens = model.api.model.generate

    def record(input_ids: Any, attention_mask: Any, **arguments: Any) -> Any:
        for tokens, kept in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            seen.append([token for token, keep in zip(tokens, kept, strict=True) if keep])
        return generate_tokens(input_ids=input_ids, attention_mask=attention_mask, **arguments)

    model.api.model.generate = record
    asked = Task(dataset=[Sample(input=i, target="") for i in inputs], solver=generate())
    task = with_prompt(spec, spec.tasks[0], asked)
    options = make_options(spec, spec.tasks[0], model)
    [log] = eval(task, model=model, display="none", log_dir=logs, max_samples=1, ctl_server=False, **options)
    assert log.status == "success", log.error
    return seen


arguments = sys.argv[1:]
print(json.dumps([read_prompts(*arguments[at : at + 3]) for at in range(0, len(arguments), 3)]))
