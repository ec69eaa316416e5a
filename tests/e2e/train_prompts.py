"""Print, as JSON, the prompt tokens of every sample that a recipe's training sees, in the order of the data.

Of a sample without a prompt, all of which is learnt: all tokens.
"""

import json
import sys

from omegaconf import OmegaConf
from torchtune import config

recipe = OmegaConf.load(sys.argv[1])
dataset = config.instantiate(recipe.dataset, config.instantiate(recipe.tokenizer))
prompts = []
for sample in dataset:
    learnt = [label != -100 for label in sample["labels"]] if "labels" in sample else [not m for m in sample["mask"]]
    prompts.append(sample["tokens"][: learnt.index(True)] or sample["tokens"])
print(json.dumps(prompts))
