"""Count the merged models that are on disk, again and again, while something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Samples:
    """How many there were at each look."""

    counts: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        return max(self.counts)


@contextmanager
def sample_merged_models(*folders: Path, seconds: float = 0.05) -> Iterator[Samples]:
    """Look for weights in the folders of merged models, whole ones and those being written."""
    samples = Samples()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            # A model that is being written is in a folder `.<point>.partial`.
            models = {
                file.parent.name.removeprefix(".").removesuffix(".partial")
                for folder in folders
                for file in folder.glob("*/*.safetensors")
            }
            samples.counts.append(len(models))
            stop.wait(seconds)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()
