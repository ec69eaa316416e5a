"""Before any training, torchtune's model answers as transformers' does: the builder, RoPE and ties are right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config
from torchtune.training import FullModelHFCheckpointer, set_default_dtype
from transformers import AutoModelForCausalLM

from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.experiment.sections import Controls
from lorasweep.trainers.torchtune.models import get_model
from tiny_model import FAMILIES, make_model, make_tokenizer

# Long enough that a scaled RoPE differs from a plain one.
TOKENS = torch.tensor([[(7 * i + 3) % 256 for i in range(400)]])


@pytest.fixture(scope="session", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / request.param
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model(request.param, tokenizer, seed=0).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def reference(directory: Path) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(TOKENS).logits


def answer(directory: Path, changes: dict[str, Any], tmp_path: Path) -> torch.Tensor:
    """The logits of torchtune's model with the checkpoint's weights, loaded as the recipe loads them."""
    found = read_checkpoint(directory)
    section, model_type = get_model(found, Controls(apply_lora_to_mlp=True))
    with set_default_dtype(torch.float32):
        model = config.instantiate(OmegaConf.create(section | changes))
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=list(found.shards),
        model_type=model_type,
        output_dir=str(tmp_path),
    )
    missing, unexpected = model.load_state_dict(checkpointer.load_checkpoint()["model"], strict=False)
    assert not unexpected
    assert all("lora" in name for name in missing)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            torch.nn.init.zeros_(parameter)
    with torch.inference_mode():
        logits = model(TOKENS)
    return torch.cat(logits, dim=1) if isinstance(logits, list) else logits


def test_torchtune_answers_as_transformers_does(checkpoint: Path, tmp_path: Path) -> None:
    expected = reference(checkpoint)
    assert expected.std() > 0.1
    assert (answer(checkpoint, {}, tmp_path) - expected).abs().max() < 1e-3


def test_a_wrong_rope_would_be_seen(checkpoint: Path, tmp_path: Path) -> None:
    section, _ = get_model(read_checkpoint(checkpoint), Controls())
    expected = reference(checkpoint)
    for key, wrong in {"rope_base": 12345, "scale_factor": 4}.items():
        if key in section:
            assert (answer(checkpoint, {key: wrong}, tmp_path) - expected).abs().max() > 1e-2
