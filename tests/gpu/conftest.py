"""A small model whose heads are as wide as those of large ones, for tests of what only a GPU shows.

Without a GPU none of them can run, and each says so.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny_model import make_model, make_tokenizer

SIZES = {"hidden_size": 256, "intermediate_size": 512}


@pytest.fixture(scope="session", autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use: torch.cuda.is_available() is false here")


@pytest.fixture(scope="session")
def get_model_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the model's checkpoint in a precision."""
    tokenizer = make_tokenizer(has_chat_template=True)

    def get(dtype: str) -> Path:
        directory = tmp_path_factory.getbasetemp() / f"model-{dtype}"
        if not directory.exists():
            model = make_model("llama3", tokenizer, seed=0, **SIZES)
            model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        return directory

    return get
