"""Print, as JSON, the prompt tokens of every sample that each recipe's training sees, in the order of the data.

They are the tokens before the last answer; of a sample without a prompt, all of which is learnt: all tokens. A recipe
with a sample that is refused has the message alone.
"""

import json
import sys

from omegaconf import OmegaConf
from torchtune import config

from lorasweep.trainers import TrainingError


def read_prompts(path: str) -> list[list[int] | str]:
    recipe = OmegaConf.load(path)
    try:
        dataset = config.instantiate(recipe.dataset, config.instantiate(recipe.tokenizer))
    except TrainingError as error:
        return [str(error)]
    prompts: list[list[int] | str] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        learnt = [label != -100 for label in sample["labels"]]
        begins = max(at for at in range(len(learnt)) if learnt[at] and (at == 0 or not learnt[at - 1]))
        prompts.append(sample["tokens"][:begins] or sample["tokens"])
    return prompts


print(json.dumps([read_prompts(path) for path in sys.argv[1:]]))
