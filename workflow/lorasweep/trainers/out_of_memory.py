"""After running out of memory, halve the batch size and double the gradient accumulation."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lorasweep.trainers import Killed
from lorasweep.trainers.memory_kills import Attempt, explain_memory_kill, read_attempt
from lorasweep.util.digest import digest_file
from lorasweep.util.files import write_aside

OUT_OF_MEMORY = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|Cuda failure.*out of memory"

MEMORY_NOTE = "train.memory.json"

_MOST_HALVINGS = 3

_ATTEMPT = "train.attempt.json"


class Training(Protocol):
    """A training whose batch can be halved."""

    @property
    def recipe(self) -> Path: ...
    @property
    def state(self) -> Path:
        """The folder of the training's own files; notes are beside it."""

    @property
    def device(self) -> str: ...
    @property
    def batch_size(self) -> int:
        """The batch size of the recipe."""


@contextmanager
def mark_attempt(training: Training) -> Iterator[None]:
    """Mark the attempt while it runs. Halve the batch size if the previous one was killed for running out of memory."""
    mark = training.state.with_name(_ATTEMPT)
    before, now = read_attempt(mark), Attempt.of_this_process(digest_file(training.recipe))
    if before and before.recipe_sha256 == now.recipe_sha256 and (why := explain_memory_kill(before, now)):
        print(f"An earlier attempt was killed for running out of memory: {why}", flush=True)
        # A smaller batch saves host memory only on the CPU. With a GPU, the retry requests more host memory.
        if training.device == "cpu":
            plan_halving(training, read_halvings(training))
    now.write(mark)
    try:
        yield
    except Killed:  # the reason is unknown: the next attempt looks for it, as if this process had been killed
        raise
    except BaseException:
        mark.unlink(missing_ok=True)
        raise
    mark.unlink(missing_ok=True)


def read_halvings(training: Training) -> int:
    """Return how many times to halve the batch size, after earlier attempts ran out of memory."""
    note = training.state.with_name(MEMORY_NOTE)
    content = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    halvings: int = content["halvings"] if content.get("recipe_sha256") == digest_file(training.recipe) else 0
    if halvings:
        size = training.batch_size // 2**halvings
        print(f"An earlier attempt ran out of memory: batch_size is now {size}", flush=True)
    return halvings


def plan_halving(training: Training, halvings: int) -> str:
    """Have the next attempt halve the batch size once more, if possible, and return a message."""
    batch_size = training.batch_size // 2**halvings
    tried = f"batch_size {batch_size} is too large"
    if halvings == _MOST_HALVINGS:
        return f"{tried}, after {halvings} halvings"
    if batch_size % 2:
        return f"{tried}, and is odd, so it cannot be halved"
    note = {"recipe_sha256": digest_file(training.recipe), "halvings": halvings + 1}
    write_aside(training.state.with_name(MEMORY_NOTE), json.dumps(note) + "\n")
    return f"{tried}: the next attempt halves it and doubles gradient_accumulation_steps"
