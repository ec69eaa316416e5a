"""Print, as JSON, what Inspect's logs hold: the completions by sample, and what the log says of the model."""

import json
import sys

from inspect_ai.log import read_eval_log


def read(file: str) -> dict[str, object]:
    log = read_eval_log(file)
    assert log.samples is not None
    return {
        "status": log.status,
        "metadata": log.eval.metadata,
        "completions": {str(sample.id): sample.output.completion for sample in log.samples},
        "by_epoch": {f"{sample.id}/{sample.epoch}": sample.output.completion for sample in log.samples},
        "answer_tokens": max(sample.output.usage.output_tokens for sample in log.samples if sample.output.usage),
        "prompt": [[message.role, message.text] for message in log.samples[0].messages if message.role != "assistant"],
        "scorers": [[scorer.name, scorer.options] for scorer in log.eval.scorers or []],
    }


print(json.dumps({file: read(file) for file in sys.argv[1:]}))
