"""A model of the provider `lorasweep` answers as its merged model does in `hf`, whoever shares its base."""

import asyncio
import gc
import os
import random
import re
import shutil
import string
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
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import forked_evaluation
from evaluation_specs import make_spec
from lorasweep.adapters.adapter import AdapterError, check_injected, read_adapter
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.probe import base_logits, choose_tokens, probe_logits
from lorasweep.evaluation.shared_base import SharedBase
from lorasweep.util.errors import InputError
from tiny_model import make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")

WEIGHTS = "adapter_model.safetensors"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    "mlp": {"r": 8, "target_modules": ["gate_proj", "up_proj", "down_proj"], "lora_dropout": 0.5},
    "linear": {"r": 16, "target_modules": "all-linear", "use_rslora": True},
    "head": {"r": 3, "target_modules": ["k_proj", "lm_head"], "rank_pattern": {"lm_head": 5}},
    "dora": {"r": 4, "target_modules": ["o_proj", "down_proj"], "use_dora": True},
    "biased": {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "whole": {"r": 4, "target_modules": ["up_proj"]},
}
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
    if adapter:
        arguments["adapter"] = str(adapter)
    return get_model("lorasweep/x", memoize=False, base=str(base), **arguments)


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
def alone(
    base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, dict[str, str]]:
    """What each adapter answers on a base of its own, and what the base does."""
    folder = tmp_path_factory.mktemp("alone")
    asked = [(name, prompt) for name in MODELS for prompt in reversed(PROMPTS)]
    with ExitStack() as opened:
        models = {
            name: opened.enter_context(open_model(shutil.copytree(base, folder / f"{name}"), adapters.get(name or "")))
            for name in MODELS
        }
        said = dict(zip(asked, complete([(models[name], prompt) for name, prompt in asked]), strict=True))
    for prompt in PROMPTS:
        assert len({said[name, prompt] for name in MODELS}) == len(MODELS), "answers that tell nothing apart"
    return {name: {prompt: said[name, prompt] for prompt in PROMPTS} for name in MODELS}


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, int]]:
    """The adapter of each batch that is generated, and how many rows that has."""
    seen: list[tuple[str | None, int]] = []
    generate = SharedBase.generate

    def record(self: SharedBase, name: str | None, **inputs: Any) -> Any:
        seen.append((name, len(inputs["input_ids"])))
        return generate(self, name, **inputs)

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
    name: str | None = model.api.adapter_name
    return name


def read_logprobs(output: ModelOutput) -> tuple[list[str], torch.Tensor]:
    """Tokens up to the answer's end, as `hf` fills the rest of a batch, and logprobs of shape [tokens, 5]."""
    content = output.choices[0].logprobs.content
    ends = [index for index, logprob in enumerate(content) if logprob.token == "<|im_end|>"]
    content = content[: ends[0] + 1] if ends else content
    values = [[top.logprob for top in logprob.top_logprobs] for logprob in content]
    return [logprob.token for logprob in content], torch.tensor(values)


@pytest.mark.parametrize("name", ["linear", "dora", "whole"])
def test_an_adapter_answers_as_its_merged_model_does_in_hf(
    base: Path, adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    merge(base, adapters[name], tmp_path / "merged", "fp32")
    user: list[list[ChatMessage]] = [[ChatMessageUser(content=prompt)] for prompt in PROMPTS[:6]]
    system = [[ChatMessageSystem(content="Be brief."), *chat] for chat in user]
    turns = [[*chat, ChatMessageAssistant(content="Why?"), ChatMessageUser(content="Because.")] for chat in user]
    long = GenerateConfig(max_tokens=24, logprobs=True, top_logprobs=5)
    stopped = GenerateConfig(max_tokens=24, stop_seqs=[*string.ascii_letters])
    asked = [(chat, long) for chat in (*user, *system, *turns)]
    asked += [(chat, config) for config in (SHORT, stopped) for chat in user]
    with ExitStack() as opened:
        ours = opened.enter_context(open_model(base, adapters[name]))
        theirs = opened.enter_context(open_merged(tmp_path / "merged"))
        plain = opened.enter_context(open_merged(base))
        outputs = ask([(model, chat, [], config) for chat, config in asked for model in (ours, theirs, plain)])
    answers = list(zip(outputs[::3], outputs[1::3], outputs[2::3], strict=True))
    for (_, config), (own, merged, untouched) in zip(asked, answers, strict=True):
        assert own.completion == merged.completion != untouched.completion
        assert own.usage.output_tokens <= config.max_tokens
        if config is long:
            (tokens, logprobs), (expected, values) = read_logprobs(own), read_logprobs(merged)
            assert tokens == expected
            assert (logprobs - values).abs().max() < 1e-3
    texts = [own.completion for own, _, _ in answers]
    assert any(len(end) < len(text) for end, text in zip(texts[-len(user) :], texts[: len(user)], strict=True))


def test_a_tool_call_is_prompted_for_and_parsed_as_in_hf(base: Path, tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + make_tokenizer(has_chat_template=True).chat_template
    properties = {"x": JSONSchema(type="integer", description="What to double.")}
    tool = ToolInfo(name="double", description="Double it.", parameters=ToolParams(properties=properties))
    chat: list[ChatMessage] = [ChatMessageUser(content="Double 4.")]
    with open_merged(base, chat_template=template) as plain:
        prompt = plain.api.hf_chat(chat, [tool])
    adapter = train(
        base, prompt, '<tool_call>{"name": "double", "arguments": {"x": 4}}</tool_call>', tmp_path / "adapter"
    )
    merge(base, adapter, tmp_path / "merged", "fp32")
    with (
        open_model(base, adapter, chat_template=template) as ours,
        open_merged(tmp_path / "merged", chat_template=template) as theirs,
    ):
        assert "What to double." in prompt
        assert ours.api.hf_chat(chat, [tool]) == theirs.api.hf_chat(chat, [tool]) == prompt
        assert ours.api.hf_chat(chat, []) == theirs.api.hf_chat(chat, [])
        own, merged = ask([(model, chat, [tool], GenerateConfig(max_tokens=80)) for model in (ours, theirs)])
    for output in (own, merged):
        (call,) = output.message.tool_calls or []
        assert (call.function, call.arguments, call.parse_error) == ("double", {"x": 4}, None)
    assert own.completion == merged.completion


def train(base: Path, prompt: str, answer: str, folder: Path) -> Path:
    """Train an adapter until it gives one answer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(has_chat_template=True)
    asked, whole = (tokenizer(text, return_tensors="pt").input_ids for text in (prompt, f"{prompt}{answer}<|im_end|>"))
    labels = whole.clone()
    labels[:, : asked.shape[1]] = -100
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(300):
        output = model(input_ids=whole, labels=labels)
        if torch.equal(output.logits[0, asked.shape[1] - 1 : -1].argmax(-1), whole[0, asked.shape[1] :]):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_sampling_with_a_seed_draws_what_hf_draws(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    merge(base, adapters["linear"], tmp_path / "merged", "fp32")
    seeded = {"config": GenerateConfig(seed=11), "do_sample": True}
    question: tuple[list[ChatMessage], list[ToolInfo], GenerateConfig] = (
        [ChatMessageUser(content=PROMPTS[0])],
        [],
        GenerateConfig(max_tokens=16, temperature=0.8, top_p=0.95),
    )

    def sample(model: Model) -> list[str]:
        """Ask one thing several times, since the rows of a batch may come in any order."""
        with model:
            return sorted(output.completion for output in ask([(model, *question)] * 6))

    drawn = sample(open_merged(tmp_path / "merged", **seeded))
    assert len(set(drawn)) > 1
    assert sample(open_model(base, adapters["linear"], **seeded)) == drawn


def test_hundreds_of_requests_at_once_are_each_answered_by_their_own_adapter(
    base: Path,
    adapters: dict[str, Path],
    alone: Mapping[str | None, Mapping[str, str]],
    batches: list[tuple[str | None, int]],
) -> None:
    asked = [(name, prompt) for name in MODELS for prompt in PROMPTS]
    random.Random(5).shuffle(asked)
    assert len(asked) >= 300
    with ExitStack() as opened:
        models = {name: opened.enter_context(open_model(base, adapters.get(name or ""))) for name in MODELS}
        chats: list[Question] = [(models[name], [ChatMessageUser(content=text)], [], SHORT) for name, text in asked]
        outputs = ask(chats, batch=16)
        named = {name_adapter(models[name]): name for name in MODELS}
    wrong = [pair for pair, output in zip(asked, outputs, strict=True) if output.completion != alone[pair[0]][pair[1]]]
    assert not wrong
    shas = {name: sha256((path / WEIGHTS).read_bytes()).hexdigest() for name, path in adapters.items()}
    assert [(output.metadata or {}).get("adapter_sha256") for output in outputs] == [
        shas.get(n or "") for n, _ in asked
    ]
    rows = [named[name] for name, size in batches for _ in range(size)]
    assert sorted(map(str, rows)) == sorted(str(name) for name, _ in asked)
    assert 1 < max(size for _, size in batches) <= 16


def test_adapters_that_come_and_go_meanwhile_change_no_answer(
    base: Path,
    adapters: dict[str, Path],
    alone: Mapping[str | None, Mapping[str, str]],
    batches: list[tuple[str | None, int]],
) -> None:
    names: list[str | None] = [None, "attention", "dora"]
    asked = [(name, prompt) for name in names for prompt in PROMPTS[:24]]
    random.Random(6).shuffle(asked)
    done = threading.Event()
    came: list[int] = []
    errors: list[Exception] = []
    answers: list[str] = []
    ends = {0}

    def come_and_go() -> None:
        for name in cycle(["linear", "whole", "mlp", "dora", "biased"]):
            if done.is_set():
                return
            try:
                with open_model(base, adapters[name]):
                    came.append(len(batches))
            except Exception as error:
                errors.append(error)

    with ExitStack() as opened:
        models = {name: opened.enter_context(open_model(base, adapters.get(name or ""))) for name in names}
        thread = threading.Thread(target=come_and_go)
        thread.start()
        try:
            # A busy machine may need more than one round.
            while len(set(came) - ends) < 5 and len(answers) < 5 * len(asked):
                answers += complete([(models[name], prompt) for name, prompt in asked], batch=8)
                ends.add(len(batches))
        finally:
            done.set()
            thread.join()
        assert models[None].api.base.attached == len(names) - 1
    assert not errors
    expected = [alone[name][prompt] for name, prompt in asked]
    assert answers == expected * (len(answers) // len(asked))
    assert len(set(came) - ends) >= 5, "nothing came between the batches"


def test_models_of_one_base_load_it_once(
    own_base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"]
) -> None:
    with ExitStack() as opened:
        for name in (None, "linear", "dora", "whole"):
            opened.enter_context(open_model(own_base, adapters.get(name or "")))
        assert len(loads) == 1
        opened.enter_context(open_model(own_base, dtype="bfloat16"))
        assert len(loads) == 2


@pytest.mark.parametrize("ending", ["closed", "dropped"])
def test_the_base_lasts_as_long_as_a_model_needs_it(
    own_base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"], ending: str
) -> None:
    models = [open_model(own_base, adapters[name]) for name in ("linear", "whole")] + [open_model(own_base)]
    kept = list(models)  # as Inspect keeps in its cache models that are closed
    while models:
        gc.collect()
        assert count_bytes(get_held(loads[0]))
        if ending == "closed":
            with models.pop():
                pass
        else:
            kept.pop()
            models.pop()
    gc.collect()
    assert len(loads) == 1
    assert loads[0]() is None


def test_the_base_is_freed_when_it_has_answered(
    own_base: Path, base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"]
) -> None:
    with open_model(own_base, adapters["linear"]) as model:
        complete([(model, PROMPTS[0])])
    with open_merged(base) as other:  # Inspect's thread holds the last batch until the next
        complete([(other, PROMPTS[0])])
    del model, other
    gc.collect()
    assert loads[0]() is None


def test_adapters_cost_no_memory(
    own_base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"]
) -> None:
    with open_model(own_base) as plain:
        held = get_held(loads[0])
        before = count_bytes(held)
        for names in (list(ADAPTERS), ["head"], ["biased", "whole"], ["dora", "linear"]):
            with ExitStack() as opened:
                for name in names:
                    opened.enter_context(open_model(own_base, adapters[name]))
                    assert count_bytes(held) == before
        tied = make_base(own_base.with_name("tied"), "qwen2")
        head = make_adapter(tied, own_base.with_name("head"), target_modules=["lm_head"])
        with open_model(tied) as other:
            held = get_held(loads[1])
            before = count_bytes(held)
            with open_model(tied, head):
                assert count_bytes(held) == before + held.get_input_embeddings().weight.nbytes
            other.api.base.restore()
            assert count_bytes(held) == before
        assert plain.api.base.attached == 0


def test_the_base_is_bit_for_bit_what_it_was_after_adapters_were_used_and_dropped(
    own_base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"]
) -> None:
    with open_model(own_base) as plain:
        with ExitStack() as opened:
            models = [opened.enter_context(open_model(own_base, adapter)) for adapter in adapters.values()]
            complete([(model, prompt) for model in models for prompt in PROMPTS[:2]])
            assert_is_base(own_base, plain, loads[0])
        assert_is_base(own_base, plain, loads[0])


def assert_is_base(folder: Path, model: Model, load: "weakref.ref[torch.nn.Module]") -> None:
    """Check weights and answers of a shared base against the same base loaded anew."""
    fresh = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.api.base.probe(None), probe_logits(fresh))
    held = get_held(load).state_dict()
    assert held.keys() == fresh.state_dict().keys()
    assert all(torch.equal(tensor, held[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["head", "dora", "biased"])
def test_an_adapter_that_came_and_went_leaves_room_for_the_next(
    own_base: Path, adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    expected = probe_merged(own_base, adapters["linear"], tmp_path / "merged")
    with open_model(own_base):
        with open_model(own_base, adapters[name]):
            pass
        with open_model(own_base, adapters["linear"]) as model:
            assert torch.equal(model.api.base.probe(name_adapter(model)), expected)


def probe_merged(base: Path, adapter: Path, folder: Path) -> torch.Tensor:
    merge(base, adapter, folder, "fp32")
    return probe_logits(AutoModelForCausalLM.from_pretrained(folder))


def test_a_batch_that_failed_changes_no_later_answer(own_base: Path, adapters: dict[str, Path]) -> None:
    tokens = {"input_ids": torch.arange(40).view(4, 10), "attention_mask": torch.ones(4, 10, dtype=torch.long)}

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with open_model(own_base, adapters["attention"]) as one, open_model(own_base, adapters["mlp"]) as other:
        base, names = one.api.base, [name_adapter(one), name_adapter(other), None]
        before = [base.generate(name, **tokens, max_new_tokens=4, do_sample=False) for name in names]
        for failing in names:
            with pytest.raises(RuntimeError, match="out of memory"):
                base.generate(failing, **tokens, max_new_tokens=4, do_sample=False, logits_processor=[fail])
            after = [base.generate(name, **tokens, max_new_tokens=4, do_sample=False) for name in names]
            assert all(torch.equal(answer, expected) for answer, expected in zip(after, before, strict=True))


def vanish(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, 1e-30) if "lora_B" in name else tensor


@pytest.mark.parametrize("others", [[], ["mlp", "whole"]], ids=["first", "third"])
@pytest.mark.parametrize("failure", ["no effect", "cut short"])
def test_an_adapter_that_fails_to_attach_leaves_nothing(
    own_base: Path,
    adapters: dict[str, Path],
    loads: list["weakref.ref[torch.nn.Module]"],
    tmp_path: Path,
    failure: str,
    others: list[str],
) -> None:
    bad = spoil(adapters["linear"], tmp_path / "bad", vanish)
    with ExitStack() as opened:
        plain = opened.enter_context(open_model(own_base))
        models = [opened.enter_context(open_model(own_base, adapters[name])) for name in others]
        before = count_bytes(get_held(loads[0]))
        probes = [plain.api.base.probe(name_adapter(model)) for model in models]
        read = read_adapter(bad, read_checkpoint(own_base))
        if failure == "cut short":
            os.truncate(bad / WEIGHTS, (bad / WEIGHTS).stat().st_size - 100)
        with pytest.raises(AdapterError if failure == "no effect" else InputError):
            plain.api.base.attach(read)
        assert plain.api.base.attached == len(others)
        assert count_bytes(get_held(loads[0])) == before
        assert_is_base(own_base, plain, loads[0])
        for model, probe in zip(models, probes, strict=True):
            assert torch.equal(plain.api.base.probe(name_adapter(model)), probe)
        models.append(opened.enter_context(open_model(own_base, adapters["linear"])))
        assert models[-1].api.proof["probe_distance"] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
    ],
    ids=["embedding", "saved head", "biases"],
)
def test_an_adapter_that_replaces_parts_of_the_base_acts_beside_others_and_leaves_the_base_usable(
    own_base: Path, adapters: dict[str, Path], tmp_path: Path, changes: dict[str, Any]
) -> None:
    adapter = make_adapter(own_base, tmp_path / "other", **changes)
    expected = probe_merged(own_base, adapter, tmp_path / "merged")
    with open_model(own_base) as plain, open_model(own_base, adapters["head"]) as first:
        untouched, probe = plain.api.base.logits, first.api.base.probe(name_adapter(first))
        with open_model(own_base, adapter) as model:
            assert torch.equal(model.api.base.probe(name_adapter(model)), expected)
            assert torch.equal(first.api.base.probe(name_adapter(first)), probe)
            assert torch.equal(model.api.base.probe(name_adapter(model)), expected)
        assert torch.equal(plain.api.base.probe(None), untouched)
        with open_model(own_base, adapters["attention"]) as model:
            assert model.api.proof["probe_distance"] > 0


@pytest.mark.parametrize("column", [1, None], ids=["of one token", "of all"])
def test_the_effect_of_an_adapter_on_embeddings_alone_is_measured_on_tokens_that_it_changes(
    own_base: Path, tmp_path: Path, column: int | None
) -> None:
    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = torch.arange(tensor.shape[1]) == column
        return tensor * kept if column and "lora_embedding_A" in name else tensor

    whole = make_adapter(own_base, tmp_path / "whole", target_modules=["embed_tokens"])
    adapter = spoil(whole, tmp_path / "adapter", keep)
    probe_merged(own_base, adapter, tmp_path / "merged")
    checkpoint = read_checkpoint(own_base)
    tokens = choose_tokens(read_adapter(adapter, checkpoint))
    assert tokens == ([column] if column else list(range(32)))
    with open_model(own_base) as plain, open_model(own_base, adapter) as model:
        assert model.api.proof["probe_distance"] > 0
        assert torch.equal(plain.api.base.probe(None), plain.api.base.logits)
        expected = probe_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
        assert torch.equal(model.api.base.probe(name_adapter(model), tokens), expected)
    logits = [base_logits(checkpoint, make_spec(), tmp_path / "probes", asked) for asked in (tokens, None, tokens)]
    assert torch.equal(logits[0], logits[2])
    assert len(logits[0]) == len(tokens or ())
    assert float((expected - logits[0]).abs().max()) == model.api.proof["probe_distance"]


def test_an_adapter_that_changes_on_disk_is_not_merged_again(
    own_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(adapters["linear"], tmp_path / "adapter")
    with open_model(own_base) as plain, open_model(own_base, adapter) as model:
        shutil.copy(adapters["mlp"] / WEIGHTS, adapter / WEIGHTS)
        plain.api.base.restore()
        with pytest.raises(AdapterError, match="has changed since it was attached"):
            plain.api.base.probe(name_adapter(model))
        assert torch.equal(plain.api.base.probe(None), plain.api.base.logits)


def make_zero(base: Path, adapter: Path, folder: Path) -> Path:
    return spoil(adapter, folder, lambda name, tensor: torch.zeros_like(tensor) if "lora_B" in name else tensor)


def make_corrupt(base: Path, adapter: Path, folder: Path) -> Path:
    shutil.copytree(adapter, folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)
    return folder


def make_foreign(base: Path, adapter: Path, folder: Path) -> Path:
    return make_adapter(make_base(folder / "llama2", "llama2"), folder, target_modules=["k_proj", "v_proj"])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_zero, "the adapter is zero"),
        (make_corrupt, "not a readable adapter"),
        (make_foreign, "trained for another model"),
    ],
)
def test_a_refused_adapter_is_named_and_disturbs_no_other(
    own_base: Path,
    adapters: dict[str, Path],
    alone: Mapping[str | None, Mapping[str, str]],
    tmp_path: Path,
    make: Callable[[Path, Path, Path], Path],
    said: str,
) -> None:
    bad = make(own_base, adapters["linear"], tmp_path / "bad")
    names = [None, "attention", "dora"]
    with ExitStack() as opened:
        models = {name: opened.enter_context(open_model(own_base, adapters.get(name or ""))) for name in names}
        base = models[None].api.base
        probes = {name: base.probe(name_adapter(models[name])) for name in names}
        with pytest.raises(AdapterError, match=said) as refused:
            open_model(own_base, bad)
        assert str(bad) in str(refused.value)
        assert base.attached == 2
        assert all(torch.equal(base.probe(name_adapter(models[name])), probes[name]) for name in names)
        asked = [(name, prompt) for name in names for prompt in PROMPTS[:4]]
        answers = complete([(models[name], prompt) for name, prompt in asked])
    assert answers == [alone[name][prompt] for name, prompt in asked]


def test_every_answer_carries_the_proof_of_its_adapter_and_the_bases_carry_none(
    base: Path, adapters: dict[str, Path]
) -> None:
    names = [None, "mlp", "dora", "whole"]
    with ExitStack() as opened:
        models = [opened.enter_context(open_model(base, adapters.get(name or ""))) for name in names]
        chats: list[list[ChatMessage]] = [[ChatMessageUser(content=prompt)] for prompt in PROMPTS[:3]]
        outputs = ask([(model, chat, [], SHORT) for chat in chats for model in models])
    for name, output in zip(names * 3, outputs, strict=True):
        found = output.metadata or {}
        if name is None:
            assert not found.keys() & PROOF
            continue
        file = adapters[name] / WEIGHTS
        assert found["adapter_sha256"] == subprocess.check_output(["sha256sum", file], text=True).split()[0]
        assert found["adapter_tensors"] == len(load_file(file))
        assert found["probe_distance"] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"adapter": ""}, "the argument 'adapter' is ''"),
        ({"adapter": None}, "the argument 'adapter' is None"),
        ({"adapter": 8}, "the argument 'adapter' is 8"),
        ({"adapter": ["one", "two"]}, "the argument 'adapter' is ['one', 'two']"),
        ({"base": None}, "the argument 'base' is None"),
        ({"base": ...}, "the argument 'base' is missing"),
        ({"model_path": "other"}, "the argument 'model_path' is 'other'"),
        ({"merged": "perhaps"}, "the argument 'merged' is 'perhaps'. Expected: true or false"),
        ({"merged": None}, "the argument 'merged' has no value"),
        ({"do_sample": "false"}, "the argument 'do_sample' is 'false'. Expected: true or false"),
        ({"trust_remote_code": 1}, "the argument 'trust_remote_code' is 1"),
        ({"enable_thinking": "off "}, "the argument 'enable_thinking' is 'off '"),
    ],
)
def test_a_wrong_argument_is_named(
    base: Path, loads: list["weakref.ref[torch.nn.Module]"], arguments: dict[str, Any], said: str
) -> None:
    given = {"base": str(base), **arguments}
    given = {name: value for name, value in given.items() if value is not ...}
    with pytest.raises(InputError, match=re.escape(said)):
        get_model("lorasweep/x", memoize=False, device="cpu", **given)
    assert not loads


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate


@task
def letters() -> Task:
    return Task(dataset=[Sample(input=letter, target=letter) for letter in "abcd"], solver=generate(), scorer=match())
"""


def list_arguments(folder: Path, base: Path, adapter: Path) -> list[str]:
    """Write a task, and return the command that evaluates it in the folder."""
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    return [
        *("eval", "task.py", "--model", "lorasweep/anything", "-M", f"base={base}", "-M", f"adapter={adapter}"),
        *("-M", "device=cpu", "-M", "do_sample=false", "--max-connections", "4", "--max-tokens", "8"),
        *("--display", "plain", "--log-dir", "logs"),
    ]


def test_inspects_command_line_evaluates_an_adapter_and_refuses_a_bad_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    zero = make_zero(base, adapters["linear"], tmp_path / "zero")
    command = [Path(sys.executable).with_name("inspect"), *list_arguments(tmp_path / "good", base, adapters["linear"])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(tmp_path / "data")}
    good = subprocess.run(command, cwd=tmp_path / "good", env=environment, capture_output=True, text=True)
    assert good.returncode == 0, good.stdout + good.stderr
    (file,) = (tmp_path / "good/logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success"
    assert log.eval.model == "lorasweep/anything"
    assert log.samples is not None
    assert len(log.samples) == 4
    expected = sha256((adapters["linear"] / WEIGHTS).read_bytes()).hexdigest()
    for sample in log.samples:
        assert sample.output.completion
        assert sample.output.metadata["adapter_sha256"] == expected
        assert sample.output.metadata["probe_distance"] > 0
    arguments = list_arguments(tmp_path / "bad", base, zero)
    bad = forked_evaluation.call("inspect_ai._cli.main", arguments, environment=environment, cwd=tmp_path / "bad")
    assert bad.returncode != 0, bad.stdout
    assert "the adapter is zero" in re.sub(r"\s+", " ", bad.stdout + bad.stderr)
    assert not list((tmp_path / "bad").glob("logs/*.eval"))


class TestUnmerged:
    """With merged=false, PEFT computes the updates beside the base's weights."""

    def test_an_adapter_answers_as_its_merged_model_does(
        self, base: Path, adapters: dict[str, Path], alone: Mapping[str | None, Mapping[str, str]]
    ) -> None:
        names = [None, "head", "dora", "biased"]
        asked = [(name, prompt) for name in names for prompt in PROMPTS[:6]]
        with ExitStack() as opened:
            models = {
                name: opened.enter_context(open_model(base, adapters.get(name or ""), merged=False)) for name in names
            }
            assert models[None].api.base is models["head"].api.base
            with open_model(base) as merged:
                assert merged.api.base is not models[None].api.base
            assert complete([(models[name], prompt) for name, prompt in asked]) == [alone[n][p] for n, p in asked]

    def test_the_base_is_what_it_was_and_no_parameter_is_frozen(
        self, own_base: Path, adapters: dict[str, Path], loads: list["weakref.ref[torch.nn.Module]"]
    ) -> None:
        wrapped = re.compile(r"\.(base_layer|original_module)\b")
        fresh = AutoModelForCausalLM.from_pretrained(own_base)
        with open_model(own_base, merged=False) as plain:
            before = count_bytes(get_held(loads[0]))
            with (
                open_model(own_base, adapters["head"], merged=False),
                open_model(own_base, adapters["dora"], merged=False),
            ):
                held = dict(get_held(loads[0]).named_parameters())
                assert all(parameter.requires_grad for name, parameter in held.items() if "lora_" not in name)
                plain_names = {wrapped.sub("", name): parameter for name, parameter in held.items()}
                assert all(torch.equal(p, plain_names[name]) for name, p in fresh.named_parameters())
            assert count_bytes(get_held(loads[0])) == before
            assert torch.equal(plain.api.base.probe(None), probe_logits(fresh))

    def test_an_adapter_that_replaces_parts_of_the_base_is_refused(self, base: Path, tmp_path: Path) -> None:
        adapter = make_adapter(base, tmp_path / "biased", target_modules=["q_proj", "o_proj"], bias="all")
        with pytest.raises(AdapterError, match="merged=true"):
            open_model(base, adapter, merged=False)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_base_in_bf16_holds_an_adapter_unrounded(
        self,
        base: Path,
        adapters: dict[str, Path],
        loads: list["weakref.ref[torch.nn.Module]"],
        tmp_path: Path,
        dtype: torch.dtype,
    ) -> None:
        half = make_base(tmp_path / "base", dtype=torch.bfloat16)
        with ExitStack() as opened:
            for name in ("linear", "dora"):
                path = spoil(adapters[name], tmp_path / name, lambda _, tensor: tensor.to(dtype))
                adapter = read_adapter(path, read_checkpoint(half))
                model = opened.enter_context(open_model(half, path, merged=False))
                assert model.api.proof["adapter_tensors"] == len(adapter.tensors)
                held = get_held(loads[0])
                assert held.dtype == torch.bfloat16
                state = {f"base_model.model.{key}": tensor for key, tensor in held.state_dict().items()}
                assert check_injected(adapter, state, name_adapter(model)) == len(adapter.tensors)
                if dtype == torch.float32:
                    rounded = {key: tensor.bfloat16() for key, tensor in state.items()}
                    with pytest.raises(AdapterError, match="changed on loading"):
                        check_injected(adapter, rounded, name_adapter(model))
