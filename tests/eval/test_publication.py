"""A trained adapter is looked at before it is published."""

from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lorasweep.trainers import TrainingError
from lorasweep.trainers.publication import check_weights
from tiny_model import save_model


@pytest.mark.parametrize("module", ["q_proj", "embed_tokens"])
def test_an_adapter_that_has_not_learnt_is_refused_and_one_that_has_is_not(tmp_path: Path, module: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=[module]))

    def check() -> None:
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        check_weights(tmp_path / "adapter_model.safetensors")

    with pytest.raises(TrainingError, match="every update is zero"):
        check()
    for parameter in model.parameters():
        parameter.data += parameter.requires_grad
    check()
