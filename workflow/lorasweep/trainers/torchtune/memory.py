"""A training whose memory was not enough takes half the batch, and twice as many for a step."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasweep.trainers import Killed
from lorasweep.trainers.memory_kills import Attempt, explain_memory_kill, read_attempt
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_aside

OUT_OF_MEMORY = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory"

MEMORY_NOTE = "train.memory.json"

_MOST_HALVINGS = 3

_ATTEMPT = "train.attempt.json"


@contextmanager
def mark_attempt(recipe: Path, config: Any) -> Iterator[None]:
    """Leave a mark while a recipe is run; where one is found, take smaller batches if that attempt lacked memory."""
    mark = Path(config.output_dir).with_name(_ATTEMPT)
    before, now = read_attempt(mark), Attempt.of_this_process(digest_file(recipe))
    if before and before.recipe_sha256 == now.recipe_sha256 and (why := explain_memory_kill(before, now)):
        print(f"An earlier attempt was killed for its memory: {why}", flush=True)
        # On a GPU a batch lies in the GPU's memory; of the machine's, a retry asks for more.
        if config.device == "cpu":
            plan_halving(recipe, config, read_halvings(recipe, config))
    now.write(mark)
    try:
        yield
    except Killed:  # it could not say why, as if all of it had been killed
        raise
    except BaseException:
        mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def read_halvings(recipe: Path, config: Any) -> int:
    """Return how often a batch is to be halved, since memory was not enough."""
    note = Path(config.output_dir).with_name(MEMORY_NOTE)
    said = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    halvings: int = said["halvings"] if said.get("recipe_sha256") == digest_file(recipe) else 0
    return halvings


def halve_batch(config: Any, halvings: int) -> None:
    """Have a recipe take smaller batches, and more of them a step."""
    if halvings:
        config.batch_size //= 2**halvings
        config.gradient_accumulation_steps *= 2**halvings
        print(f"Memory was not enough before: batch_size is {config.batch_size} now", flush=True)


def plan_halving(recipe: Path, config: Any, halvings: int) -> str:
    """Leave word that from now on half the batch is taken, and return what to say of it; `config` is as given."""
    batch_size = config.batch_size // 2**halvings
    tried = f"batch_size {batch_size} is too much"
    if halvings == _MOST_HALVINGS:
        return f"{tried}, after {halvings} halvings"
    if batch_size % 2:
        return f"{tried}, and has no half"
    note = {"recipe_sha256": digest_file(recipe), "halvings": halvings + 1}
    write_aside(Path(config.output_dir).with_name(MEMORY_NOTE), json.dumps(note) + "\n")
    return f"{tried}: the next attempt takes half of it, and twice the gradient_accumulation_steps"
