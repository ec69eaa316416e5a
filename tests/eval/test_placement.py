"""A model on several GPUs: what each job takes, what it refuses, and what a spread model answers."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.model import GenerateConfig, get_model
from transformers import AutoModelForCausalLM

from evaluation_specs import make_spec
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.evaluation import evaluate
from lorasweep.evaluation.placement import refuse_offload, take_gpus
from lorasweep.evaluation.probe import probe_logits
from lorasweep.evaluation.spec import EvaluationSpec
from lorasweep.util.errors import InputError
from tiny_model import make_model, make_tokenizer

SPREAD = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}
"""Two places where there are no two GPUs: accelerate's hooks move values between them as they do between GPUs."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model("llama3", tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return read_checkpoint(folder)


@pytest.mark.parametrize(
    ("visible", "gpus", "taken"),
    [(None, 2, "0,1"), ("4,5,6", 2, "4,5"), ("GPU-a,GPU-b", 2, "GPU-a,GPU-b"), ("4,5", 1, "4,5"), (None, 0, None)],
)
def test_a_job_takes_the_first_of_the_gpus_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, taken: str | None
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which the test's end restores
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    spec = take_gpus(make_spec(device="cuda"), gpus)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == taken
    assert spec.placement == ("auto" if gpus > 1 else "cuda:0")
    assert spec.sha256 == make_spec(device="cuda").sha256


def test_a_job_with_fewer_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"evaluation\.gpus is 2, but this job sees 1"):
        take_gpus(make_spec(device="cuda"), 2)


@pytest.mark.parametrize(
    ("device", "gpus", "placement"), [("cpu", 1, "cpu"), ("cuda", 1, "cuda:0"), ("cuda", 2, "auto")]
)
def test_the_provider_is_told_where_the_model_goes(
    base: Checkpoint, monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, placement: str
) -> None:
    places = []

    def load(path: str, **arguments: Any) -> Any:
        places.append(arguments.pop("device_map"))
        return read(path, device_map="cpu", **arguments)

    read = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    spec = make_spec(device=device, gpus=gpus)
    evaluate.make_model(spec, "hf/base", base, model_path=str(base.path))
    evaluate.make_model(spec, "lorasweep/base", base, base=str(base.path)).api.close()
    assert places == [placement, placement]


def test_a_spread_model_answers_as_a_whole_one(base: Checkpoint, tmp_path: Path) -> None:
    def ask(**arguments: Any) -> tuple[torch.Tensor, str]:
        config = GenerateConfig(max_connections=1, max_tokens=12)
        model = get_model("hf/x", memoize=False, config=config, model_path=str(base.path), do_sample=False, **arguments)
        logits = probe_logits(model.api.model)
        return logits, asyncio.run(model.generate("after a")).completion

    whole, answer = ask(device="cpu")
    spread, same = ask(device=SPREAD, offload_folder=str(tmp_path))
    assert torch.equal(spread, whole)
    assert same == answer != ""


def test_a_model_that_does_not_fit_its_gpus_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.path, device_map=SPREAD, offload_folder=str(tmp_path))
    with pytest.raises(InputError, match=r"parts of it would be on cpu and disk. Expected: a larger evaluation\.gpus"):
        refuse_offload(model)
    refuse_offload(AutoModelForCausalLM.from_pretrained(base.path, device_map="cpu"))


def test_neither_provider_answers_with_a_model_that_does_not_fit(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationSpec, "placement", SPREAD)
    folder = str(base.path)
    for name, arguments in {"hf/x": {"model_path": folder}, "lorasweep/x": {"base": folder}}.items():
        with pytest.raises(InputError, match="is not enough for the model"):
            evaluate.make_model(make_spec(), name, base, offload_folder=str(tmp_path), **arguments)
