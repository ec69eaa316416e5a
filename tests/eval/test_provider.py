"""A model of the provider `lorasweep` answers as its merged model does in `hf`, whoever shares its base."""

import asyncio
import gc
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from inspect_ai.log import read_eval_log
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    Model,
    ModelOutput,
    get_model,
)
from inspect_ai.model._providers.hf import HuggingFaceAPI
from inspect_ai.tool import ToolInfo, ToolParams
from inspect_ai.util import JSONSchema
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorasweep.adapter import AdapterError, check_injected, read_adapter
from lorasweep.checkpoint import read_checkpoint
from lorasweep.merge import merge
from lorasweep.probe import probe_logits
from lorasweep.shared_base import SharedBase
from tiny_model import make_model, make_tokenizer

WEIGHTS = "adapter_model.safetensors"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_dropout": 0.5},
    "linear": {"r": 16, "target_modules": "all-linear", "use_rslora": True},
    "head": {"r": 3, "target_modules": ["k_proj", "lm_head"], "rank_pattern": {"lm_head": 5}},
    "dora": {"r": 4, "target_modules": ["o_proj", "down_proj"], "use_dora": True},
    "biased": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "whole": {"r": 4, "target_modules": ["up_proj"], "modules_to_save": ["embed_tokens", "norm"]},
}
NEVER_MIXED = {"dora", "biased", "whole"}
MODELS: list[str | None] = [None, *ADAPTERS]
"""All of them on one base; None is the base itself."""

PROMPTS = [f"{'How much is ' * (number % 3)}{number * 37} and {number}?" for number in range(38)]
SHORT = GenerateConfig(max_tokens=8)
PROOF = {"adapter_sha256", "adapter_tensors", "probe_distance"}

Question = tuple[Model, list[ChatMessage], list[ToolInfo], GenerateConfig]


def make_base(folder: Path, family: str = "qwen2.5", dtype: torch.dtype = torch.float32) -> Path:
    tokenizer = make_tokenizer(has_chat_template=True)
    make_model(family, tokenizer, seed=1).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Let PEFT make an adapter with an update as large as a training leaves."""
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 12, "target_modules": LINEAR, "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name or "modules_to_save" in name or (name.endswith(".bias") and config.get("bias")):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def spoil(adapter: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """Copy an adapter, its tensors changed."""
    shutil.copytree(adapter, folder)
    save_file({name: change(name, tensor) for name, tensor in load_file(adapter / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def own_base(base: Path, tmp_path: Path) -> Path:
    """A copy of the base that no other test has loaded."""
    return shutil.copytree(base, tmp_path / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: make_adapter(base, folder / name, seed=number, **changes)
        for number, (name, changes) in enumerate(ADAPTERS.items())
    }


def open_model(base: Path, adapter: Path | None = None, **arguments: Any) -> Model:
    arguments = {"do_sample": False, "device": "cpu", **arguments}
    return get_model("lorasweep/x", memoize=False, base=str(base), adapter=adapter and str(adapter), **arguments)


def open_merged(folder: Path, **arguments: Any) -> Model:
    arguments = {"do_sample": False, "device": "cpu", **arguments}
    return get_model("hf/x", memoize=False, model_path=str(folder), **arguments)


def ask(questions: Sequence[Question], batch: int | None = None) -> list[ModelOutput]:
    """Ask all at once. In one batch if not told otherwise: Inspect need not wait whether more questions come."""
    size = GenerateConfig(max_connections=batch or len(questions))

    async def ask_all() -> list[ModelOutput]:
        return await asyncio.gather(
            *(model.api.generate(chat, tools, "auto", config.merge(size)) for model, chat, tools, config in questions)
        )

    return asyncio.run(ask_all())


def complete(pairs: Sequence[tuple[Model, str]], batch: int | None = None) -> list[str]:
    outputs = ask([(model, [ChatMessageUser(content=prompt)], [], SHORT) for model, prompt in pairs], batch)
    return [output.completion for output in outputs]


@pytest.fixture(scope="module")
def alone(base: Path, adapters: dict[str, Path]) -> dict[str | None, dict[str, str]]:
    """What each adapter answers where no other is, and what the base does."""
    answers: dict[str | None, dict[str, str]] = {}
    prompts = PROMPTS[::-1]
    for name in MODELS:
        with open_model(base, adapters.get(name or "")) as model:
            answers[name] = dict(zip(prompts, complete([(model, prompt) for prompt in prompts]), strict=True))
    for prompt in PROMPTS:
        assert len({answers[name][prompt] for name in MODELS}) == len(MODELS), "answers that tell nothing apart"
    return answers


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str | None]]:
    """The adapters of the rows of each batch that is generated."""
    seen: list[Sequence[str | None]] = []
    generate = SharedBase.generate

    def record(self: SharedBase, names: Sequence[str | None], **inputs: Any) -> Any:
        seen.append(list(names))
        return generate(self, names, **inputs)

    monkeypatch.setattr(SharedBase, "generate", record)
    return seen


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list["weakref.ref[torch.nn.Module]"]:
    """The models that Inspect's own provider loads, alive or not."""
    seen: list[weakref.ref[torch.nn.Module]] = []
    load = HuggingFaceAPI.__init__

    def record(self: HuggingFaceAPI, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        seen.append(weakref.ref(self.model))

    monkeypatch.setattr(HuggingFaceAPI, "__init__", record)
    return seen


def get_held(load: "weakref.ref[torch.nn.Module]") -> torch.nn.Module:
    model = load()
    assert model is not None
    return model


def count_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def name_adapter(model: Model) -> str | None:
    """What the shared base calls a model's adapter."""
    name: str | None = model.api.hf_chat([ChatMessageUser(content="")], []).adapter
    return name


def assert_same_logprobs(ours: ModelOutput, theirs: ModelOutput) -> None:
    for own, other in zip(ours.choices[0].logprobs.content, theirs.choices[0].logprobs.content, strict=True):
        assert own.token == other.token
        for value, expected in zip(own.top_logprobs, other.top_logprobs, strict=True):
            assert value.logprob == pytest.approx(expected.logprob, abs=1e-3)


@pytest.mark.parametrize("name", ["linear", "dora", "whole"])
def test_an_adapter_answers_as_its_merged_model_does_in_hf(
    base: Path, adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    merge(base, adapters[name], tmp_path / "merged", "fp32")
    user = [[ChatMessageUser(content=prompt)] for prompt in PROMPTS[:6]]
    system = [[ChatMessageSystem(content="Be brief."), *chat] for chat in user]
    turns = [[*chat, ChatMessageAssistant(content="Why?"), ChatMessageUser(content="Because.")] for chat in user]
    long = GenerateConfig(max_tokens=24, logprobs=True, top_logprobs=5)
    asked = [(chat, long) for chat in (*user, *system, *turns)] + [(chat, SHORT) for chat in user]
    with (
        open_model(base, adapters[name]) as ours,
        open_merged(tmp_path / "merged") as theirs,
        open_merged(base) as plain,
    ):
        questions = [(model, chat, [], config) for model in (ours, theirs, plain) for chat, config in asked]
        outputs = ask(questions)
        own, merged, untouched = (outputs[start :: len(asked)] for start in range(3)) if False else (
            outputs[: len(asked)],
            outputs[len(asked) : 2 * len(asked)],
            outputs[2 * len(asked) :],
        )
        assert [output.completion for output in own] == [output.completion for output in merged]
        assert [output.usage for output in own] == [output.usage for output in merged]
        for output, expected, unlike in zip(own, merged, untouched, strict=True):
            assert output.completion != unlike.completion
            if expected.choices[0].logprobs:
                assert_same_logprobs(output, expected)
