"""Print, as JSON, the tokens that an evaluation hands to the model for each sample of a file, in its order."""

import json
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser
from inspect_ai.solver import generate

from lorasweep.checkpoint import read_checkpoint
from lorasweep.evaluation import EvaluationSpec
from lorasweep.evaluator import _make_model, make_options, with_prompt

spec = EvaluationSpec.model_validate_json(sys.argv[1])
base = read_checkpoint(Path(spec.base_model))
model = _make_model(spec, "hf/prompts", base, model_path=str(base.path))
messages = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def read(line: str) -> Any:
    sample = json.loads(line)
    if "input" in sample:
        return sample["input"]
    return [messages[m["role"]](content=m["content"]) for m in sample["messages"][:-1]]


inputs = [read(line) for line in Path(sys.argv[2]).read_text().splitlines()]
seen: list[list[int]] = []
generate_tokens = model.api.model.generate


def record(input_ids: Any, attention_mask: Any, **arguments: Any) -> Any:
    for tokens, kept in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
        seen.append([token for token, keep in zip(tokens, kept, strict=True) if keep])
    return generate_tokens(input_ids=input_ids, attention_mask=attention_mask, **arguments)


model.api.model.generate = record
task = with_prompt(spec, spec.tasks[0], Task(dataset=[Sample(input=i, target="") for i in inputs], solver=generate()))
options = make_options(spec, spec.tasks[0], model)
[log] = eval(task, model=model, display="none", log_dir=sys.argv[3], max_samples=1, ctl_server=False, **options)
assert log.status == "success", log.error
print(json.dumps(seen))
