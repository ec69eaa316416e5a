"""Print, as JSON, the prompt tokens of every sample that each recipe's training sees, in the order of the data.

Of a sample without a prompt, all of which is learnt: all tokens.
"""

import json
import sys

from omegaconf import OmegaConf
from torchtune import config


def read_prompts(path: str) -> list[list[int]]:
    recipe = OmegaConf.load(path)
    dataset = config.instantiate(recipe.dataset, config.instantiate(recipe.tokenizer))
    prompts = []
    for sample in dataset:
        labels = sample.get("labels")
        learnt = [label != -100 for label in labels] if labels is not None else [not m for m in sample["mask"]]
        prompts.append(sample["tokens"][: learnt.index(True)] or sample["tokens"])
    return prompts


print(json.dumps([read_prompts(path) for path in sys.argv[1:]]))
