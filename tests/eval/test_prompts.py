"""A model stops at every token that may end an answer, is asked on the experiment's date, and with its own tokens."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inspect_ai.model import ChatMessageUser, GenerateConfig
from inspect_ai.model._providers import hf
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from evaluation_specs import make_spec
from lorasweep.adapters.merge import merge
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.evaluation.evaluate import make_model
from lorasweep.evaluation.inspect_tasks import make_options
from lorasweep.evaluation.prompts import get_replacement
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.evaluation.vllm import get_server_args, make_served_model
from lorasweep.util.errors import InputError
from recipes import GIVEN_TEMPLATE
from tiny_model import make_model as make_tiny
from tiny_model import make_tokenizer

TEMPLATES = Path(__file__).parents[1] / "chat_templates"
PROVIDERS = ("hf", "lorasweep")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "base"
    tokenizer = make_tokenizer(has_chat_template=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>"]})
    make_tiny("llama3", tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _polls_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The provider looks for an answer once a second."""
    monkeypatch.setattr(hf, "anyio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(0.02)))


@pytest.fixture
def base(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "base")


def change(file: Path, **keys: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(content | keys))


def open_model(base: Path, provider: str, **changes: Any) -> tuple[Any, EvaluationSpec]:
    spec = make_spec(base_model=str(base), max_connections=1, **changes)
    checkpoint = read_checkpoint(base)
    where = {"model_path": str(base)} if provider == "hf" else {"base": str(base)}
    return make_model(spec, f"{provider}/x", checkpoint, **where), spec


def answer(model: Any, prompt: str = "after a", most: int = 12) -> list[int]:
    """Return the tokens of an answer, the one that ends it included."""
    network = model.api.base._model if hasattr(model.api, "base") else model.api.model
    generate, got = network.generate, []

    def record(**arguments: Any) -> Any:
        output = generate(**arguments)
        got.extend(output.sequences[0, arguments["input_ids"].shape[1] :].tolist())
        return output

    network.generate = record
    asyncio.run(model.generate(prompt, config=GenerateConfig(max_tokens=most)))
    network.generate = generate
    return got


def ask(model: Any, spec: EvaluationSpec, prefix: str | None) -> tuple[list[int], list[int], str]:
    """Return the tokens of a task's prompt, those of its answer, and the answer's text as a scorer has it."""
    network = model.api.base._model if hasattr(model.api, "base") else model.api.model
    generate, got = network.generate, []

    def record(**arguments: Any) -> Any:
        output = generate(**arguments)
        got.append((arguments["input_ids"][0].tolist(), output.sequences[0].tolist()))
        return output

    network.generate = record
    task = TaskSpec(name="a", task="a.py", args={}, limit=None, assistant_prefix=prefix)
    make_options(spec, task, model)
    output = asyncio.run(model.generate("after a", config=GenerateConfig(max_tokens=12)))
    network.generate = generate
    [(asked, whole)] = got
    return asked, whole[len(asked) :], output.completion


PREFIX = "It is: "


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("form", ["template", "no template", "plain"])
def test_an_answer_continues_from_the_tasks_prefix_and_is_without_it(base: Path, provider: str, form: str) -> None:
    if form == "no template":
        (base / "chat_template.jinja").unlink()
        read_checkpoint.cache_clear()
    model, spec = open_model(base, provider, has_plain_prompts=True if form == "plain" else None)
    tokenizer = model.api.tokenizer
    bare, begun, _ = ask(model, spec, None)
    asked, answered, text = ask(model, spec, PREFIX)
    assert asked == bare + tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    assert text == tokenizer.decode(answered, skip_special_tokens=True)
    assert not text.startswith(PREFIX)
    if form == "template":
        chat = [{"role": "user", "content": "after a"}, {"role": "assistant", "content": PREFIX}]
        continued = tokenizer.apply_chat_template(chat, continue_final_message=True, tokenize=False)
        assert asked == tokenizer(continued, add_special_tokens=False)["input_ids"]
    # The next task has none.
    assert ask(model, spec, None)[:2] == (bare, begun)


def test_an_answer_that_is_begun_with_its_own_beginning_goes_on_as_it_did(base: Path) -> None:
    model, spec = open_model(base, "hf")
    tokenizer = model.api.tokenizer
    bare, begun, _ = ask(model, spec, None)
    own = next(n for n in range(11, 0, -1) if "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode(begun[:n]))
    asked, answered, _ = ask(model, spec, tokenizer.decode(begun[:own]))
    assert asked == bare + begun[:own]
    assert answered[: 12 - own] == begun[own:]


@pytest.mark.parametrize("form", ["template", "its end is a line break", "dated", "no template"])
def test_a_server_writes_the_prefix_after_what_an_answer_begins_with(base: Path, form: str) -> None:
    tokenizer = make_tokenizer(has_chat_template=form != "no template")
    template = tokenizer.chat_template
    if form == "its end is a line break":
        template += "\n"
    if form == "dated":
        template = (TEMPLATES / "llama_3_2.jinja").read_text()
    checkpoint = SimpleNamespace(
        path=base, has_chat_template=bool(template), chat_template=template, given_template=None
    )
    task = TaskSpec(name="a", task="a.py", args={}, limit=None, assistant_prefix=PREFIX)
    spec = make_spec(backend="vllm", tasks=[task], template_date="2024-07-26")
    arguments = get_server_args(spec, checkpoint, [])  # type: ignore[arg-type]
    assert "use_chat_template" not in arguments
    served = Path(arguments["chat_template"]).read_text()
    chat = [{"role": "user", "content": "after a"}]

    def render(template: str, **variables: str) -> str:
        return str(
            tokenizer.apply_chat_template(
                chat, chat_template=template, add_generation_prompt=True, tokenize=False, **variables
            )
        )

    day = get_replacement(checkpoint, spec.template_date)  # type: ignore[arg-type]
    plain = render(day or template) if template else "user: after a\n"
    assert plain.endswith("\n")
    assert render(served) == plain
    assert render(served, assistant_prefix=PREFIX) == plain + PREFIX


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json", "tokenizer_config.json"])
def test_an_end_that_only_one_file_names_ends_an_answer(made: Path, base: Path, file: str, provider: str) -> None:
    whole = answer(open_model(made, provider)[0])
    assert len(whole) == 12
    # A token that the model writes by itself becomes an end.
    at = next(at for at in range(2, 12) if whole[at] not in whole[:at])
    end = whole[at]
    if file == "tokenizer_config.json":
        change(base / file, eos_token=make_tokenizer(has_chat_template=True).convert_ids_to_tokens(end))
    else:
        change(base / file, eos_token_id=[end, 3])
    read_checkpoint.cache_clear()
    model, _ = open_model(base, provider)
    assert answer(model) == whole[: at + 1]
    text = make_tokenizer(has_chat_template=True).convert_ids_to_tokens(end)
    assert {text, "<|im_end|>"} <= {*model.api.end_tokens}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_end_that_the_template_writes_is_one(base: Path, provider: str) -> None:
    change(base / "tokenizer_config.json", eos_token="<other>")
    change(base / "config.json", eos_token_id=0)
    change(base / "generation_config.json", eos_token_id=1)
    read_checkpoint.cache_clear()
    model, _ = open_model(base, provider)
    assert model.api.end_tokens == ["<|im_end|>", "<other>", "\"", "!"]  # fmt: skip
    plain, _ = open_model(base, provider, has_plain_prompts=True)
    assert plain.api.end_tokens == ["<other>", "\"", "!"]  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_tokenizer_that_ends_every_text_is_refused_for_plain_prompts(base: Path, provider: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    end = ("<|im_end|>", tokenizer.convert_tokens_to_ids("<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|im_end|>", special_tokens=[end])
    tokenizer.save_pretrained(base)
    read_checkpoint.cache_clear()
    open_model(base, provider)  # the template writes the special tokens
    with pytest.raises(InputError, match=r"the tokenizer writes '<\|im_end\|>' behind every text"):
        open_model(base, provider, has_plain_prompts=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pad", [0, None, "<|im_end|>"])
def test_what_follows_the_end_in_a_batch_is_no_answer(made: Path, base: Path, provider: str, pad: Any) -> None:
    """The configuration's padding may be a letter, or nothing: answers of different lengths are padded."""
    whole = answer(open_model(made, provider)[0])
    change(base / "generation_config.json", eos_token_id=whole[3], pad_token_id=pad if isinstance(pad, int) else None)
    change(base / "config.json", pad_token_id=pad if isinstance(pad, int) else None)
    change(base / "tokenizer_config.json", pad_token=pad if isinstance(pad, str) else None)
    read_checkpoint.cache_clear()
    model, _ = open_model(base, provider)
    alone = [asyncio.run(model.generate(p, config=GenerateConfig(max_tokens=8))).completion for p in ("after a", "b")]

    async def ask() -> list[str]:
        config = GenerateConfig(max_tokens=8, max_connections=2)
        outputs = await asyncio.gather(*(model.generate(prompt, config=config) for prompt in ("after a", "b")))
        return [output.completion for output in outputs]

    assert asyncio.run(ask()) == alone
    assert len(alone[0]) <= 4


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_date_is_that_of_the_specification(base: Path, provider: str) -> None:
    shutil.copyfile(TEMPLATES / "llama_3_2.jinja", base / "chat_template.jinja")
    read_checkpoint.cache_clear()
    model, _ = open_model(base, provider, template_date="2025-01-31")
    assert "Today Date: 31 Jan 2025\n" in model.api.hf_chat([ChatMessageUser(content="a")], [])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_prompt_with_a_token_that_has_no_row_is_refused_by_name(base: Path, provider: str) -> None:
    tokenizer = make_tokenizer(has_chat_template=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>", "<image>"]})
    tokenizer.save_pretrained(base)
    read_checkpoint.cache_clear()
    model, _ = open_model(base, provider)
    assert answer(model, "after a")
    with pytest.raises(InputError, match=r"a prompt has the token '<image>', but the model's embedding has \d+ rows"):
        asyncio.run(model.generate("what is <image>?", config=GenerateConfig(max_tokens=2)))


class TestServer:
    """What a vLLM server is told."""

    def make(self, base: Path, **changes: Any) -> EvaluationSpec:
        return make_spec(backend="vllm", base_model=str(base), dtype="bf16", device="cuda", **changes)

    def test_every_request_names_all_ends(self, base: Path) -> None:
        change(base / "generation_config.json", eos_token_id=[0, 1])
        read_checkpoint.cache_clear()
        model = make_served_model(self.make(base), read_checkpoint(base), None, ())
        ids = make_tokenizer(has_chat_template=True).convert_tokens_to_ids(model.api.end_tokens)
        assert ids[1:] == [0, 1]
        assert model.config.extra_body == {"stop_token_ids": ids}

    def test_the_template_has_the_date_of_the_specification(self, base: Path) -> None:
        checkpoint = read_checkpoint(base)
        assert "chat_template" not in get_server_args(self.make(base), checkpoint, ())
        shutil.copyfile(TEMPLATES / "llama_3_2.jinja", base / "chat_template.jinja")
        read_checkpoint.cache_clear()
        spec = self.make(base, template_date="2025-01-31")
        file = Path(get_server_args(spec, read_checkpoint(base), ())["chat_template"])
        assert 'date_string = "31 Jan 2025"' in file.read_text()

    @pytest.mark.parametrize("own", ["another template", "no template"])
    def test_a_given_template_is_the_one_it_gets(self, base: Path, own: str) -> None:
        if own == "no template":
            (base / "chat_template.jinja").unlink()
        read_checkpoint.cache_clear()
        arguments = get_server_args(self.make(base), read_checkpoint(base, GIVEN_TEMPLATE), ())
        assert Path(arguments["chat_template"]).read_text() == GIVEN_TEMPLATE
        assert "use_chat_template" not in arguments


@pytest.mark.parametrize("own", ["another template", "no template"])
def test_a_given_template_writes_the_prompts_in_every_mode_and_of_all_who_load_what_is_kept(
    base: Path, tmp_path: Path, own: str
) -> None:
    if own == "no template":
        (base / "chat_template.jinja").unlink()
    read_checkpoint.cache_clear()
    given = read_checkpoint(base, GIVEN_TEMPLATE)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(adapter)
    given.copy_tokenizer(adapter)
    record = {"base_model_fingerprint": given.fingerprint, **given.template_record}
    (adapter / "lorasweep.json").write_text(json.dumps(record))
    assert merge(base, adapter, merged)["chat_template_sha256"] == given.template_record["chat_template_sha256"]
    spec, without = (
        make_spec(base_model=str(base), max_connections=1, chat_template=t) for t in (GIVEN_TEMPLATE, None)
    )
    folders = {"base": str(base), "adapter": str(adapter)}
    models = {
        "A and B1": make_model(spec, "hf/x", given, model_path=str(merged)),
        "B2": make_model(spec, "lorasweep/x", given, **folders),
        "baseline": make_model(spec, "hf/x", given, model_path=str(base)),
        "baseline in memory": make_model(spec, "lorasweep/x", given, base=str(base)),
        # Without the experiment.
        "the merged model": make_model(without, "hf/x", read_checkpoint(merged), model_path=str(merged)),
        "the adapter": make_model(without, "lorasweep/x", given, **folders),
    }
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    chat = [{"role": "user", "content": "after a"}]
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(expected) == "<user>after a<|im_end|>\n<assistant>"
    assert {name: ask(model, spec, None)[0] for name, model in models.items()} == dict.fromkeys(models, expected)
    plain = make_model(without, "lorasweep/x", read_checkpoint(base), base=str(base))
    assert ask(plain, without, None)[0] != expected
