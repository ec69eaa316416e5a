"""The prompts of training, with the chat templates of real models: what they cannot render as it is, is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from torchtune.data import Message
from transformers import AutoTokenizer

from lorasweep.trainers.tokenizer import SampleError
from lorasweep.trainers.torchtune.tokenizer import ChatTokenizer
from recipes import GIVEN_TEMPLATE
from tiny_model import make_tokenizer

TEMPLATES = Path(__file__).parents[1] / "chat_templates"

# The tokens that end an answer, as each model's tokenizer has them: that of a turn, and that of a text.
ENDS = {
    "gemma_2": ("<end_of_turn>", "<eos>"),
    "gemma_3": ("<end_of_turn>", "<eos>"),
    "llama_3_1": ("<|eot_id|>", "<|end_of_text|>"),
    "llama_3_2": ("<|eot_id|>", "<|end_of_text|>"),
    "mistral_0_2": ("</s>", "</s>"),
    "phi_3": ("<|end|>", "<|endoftext|>"),
    "phi_3_5": ("<|end|>", "<|endoftext|>"),
    "phi_4": ("<|im_end|>", "<|endoftext|>"),
    "qwen_2_5": ("<|im_end|>", "<|endoftext|>"),
    "qwen_3": ("<|im_end|>", "<|endoftext|>"),
    "smollm_2": ("<|im_end|>", "<|endoftext|>"),
}

Make = Callable[..., ChatTokenizer]


@pytest.fixture
def make(model: Path, tmp_path: Path) -> Make:
    """Make the tokenizer of a tiny model with a real template, and with the tokens that the template's model has."""

    def make(
        template: str | None, eos: str = "<|im_end|>", special: tuple[str, ...] = (), **arguments: Any
    ) -> ChatTokenizer:
        folder = tmp_path / f"model {template}"
        shutil.copytree(model, folder)
        tokenizer = make_tokenizer(has_chat_template=False)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted({*special} - {*tokenizer.get_vocab()})})
        tokenizer.eos_token = eos
        if template:
            tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        tokenizer.save_pretrained(folder)
        if template is None:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": tokenizer.eos_token_id}
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
        (folder / "generation_config.json").unlink(missing_ok=True)
        made = ChatTokenizer(str(folder), **arguments)
        made._rows = len(tokenizer)  # type: ignore[misc]  # the weights are those of fewer tokens
        return made

    return make


def make_real(make: Make, template: str, **arguments: Any) -> ChatTokenizer:
    turn, text = ENDS[template]
    return make(template, eos=text, special=(turn, text), **arguments)


def tokenize(tokenizer: ChatTokenizer, *messages: tuple[str, str]) -> tuple[str, str]:
    """Return the text of the prompt, before the last answer, and that of the answer."""
    plain = [Message(role=role, content=content, masked=role != "assistant") for role, content in messages]
    tokens, mask = tokenizer.tokenize_messages(plain)
    begins = max(at for at in range(len(mask)) if not mask[at] and (at == 0 or mask[at - 1]))
    decode = tokenizer.tokenizer.decode
    return decode(tokens[:begins]), decode(tokens[begins:])


def render(tokenizer: ChatTokenizer, *messages: tuple[str, str]) -> str:
    """Return the prompt as Inspect's provider renders it."""
    chat = [{"role": role, "content": content} for role, content in messages]
    return str(
        tokenizer.tokenizer.apply_chat_template(
            chat, chat_template=tokenizer.template, add_generation_prompt=True, tokenize=False, enable_thinking=None
        )
    )


@pytest.mark.parametrize("template", ENDS)
class TestRealTemplates:
    def test_a_prompt_is_what_evaluation_renders(self, make: Make, template: str) -> None:
        tokenizer = make_real(make, template, template_date="2024-07-26")
        prompt, answer = tokenize(tokenizer, ("user", "after a"), ("assistant", "b"))
        assert prompt == render(tokenizer, ("user", "after a"))
        assert "after a" in prompt
        assert "b" in answer

    def test_the_end_of_a_turn_is_taught_and_every_end_stops(self, make: Make, template: str) -> None:
        tokenizer = make_real(make, template)
        turn, text = ENDS[template]
        assert tokenizer.end.names == list(dict.fromkeys((turn, text)))
        _, answer = tokenize(tokenizer, ("user", "after a"), ("assistant", "b"))
        assert answer.split("b", 1)[1].startswith(turn)
        assert tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.plain_end.taught) == text


NO_SYSTEM = ("gemma_2", "mistral_0_2")


@pytest.mark.parametrize("template", ENDS)
def test_a_system_message_is_rendered_or_refused(make: Make, template: str) -> None:
    tokenizer = make_real(make, template, template_date="2024-07-26")
    messages = [("system", "Be brief."), ("user", "after a"), ("assistant", "b")]
    if template in NO_SYSTEM:
        with pytest.raises(SampleError, match=r"the chat template refuses the messages \(system, user\)"):
            tokenize(tokenizer, *messages)
        return
    prompt, _ = tokenize(tokenizer, *messages)
    assert prompt == render(tokenizer, *messages[:2])
    assert "Be brief." in prompt


CONVERSATION = (("user", "after a"), ("assistant", "b"), ("user", "and then?"), ("assistant", "c"))

CHANGED = {
    "phi_3": "writes earlier messages otherwise",  # the end of a text follows the last answer
    "phi_3_5": "writes earlier messages otherwise",
    "qwen_3": "writes earlier messages otherwise",  # an empty <think> block stands in the last answer
}


@pytest.mark.parametrize("template", ENDS)
def test_a_conversation_is_what_evaluation_renders_or_is_refused(make: Make, template: str) -> None:
    tokenizer = make_real(make, template, template_date="2024-07-26")
    if reason := CHANGED.get(template):
        with pytest.raises(SampleError, match=reason):
            tokenize(tokenizer, *CONVERSATION)
        return
    prompt, _ = tokenize(tokenizer, *CONVERSATION)
    assert prompt == render(tokenizer, *CONVERSATION[:3])


TRIMMED = ("gemma_2", "gemma_3", "llama_3_1", "llama_3_2")


@pytest.mark.parametrize(
    ("number", "messages"),
    [(0, (("user", "after a\n"), ("assistant", "b"))), (1, (("user", "a"), ("assistant", " b")))],
)
@pytest.mark.parametrize("template", ENDS)
def test_blanks_at_the_edges_are_kept_or_refused(
    make: Make, template: str, number: int, messages: tuple[tuple[str, str], ...]
) -> None:
    tokenizer = make_real(make, template, template_date="2024-07-26")
    if template in TRIMMED:
        role = messages[number][0]
        with pytest.raises(SampleError, match=f"message {number}: .* writes the {role} message without the blanks"):
            tokenize(tokenizer, *messages)
        return
    prompt, answer = tokenize(tokenizer, *messages)
    assert messages[number][1] in (prompt, answer)[number]


def test_a_think_block_that_is_rewritten_is_refused(make: Make) -> None:
    tokenizer = make_real(make, "qwen_3")
    _, answer = tokenize(tokenizer, ("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nb"))
    assert answer.startswith("<think>\nhm\n</think>\n\nb<|im_end|>")
    with pytest.raises(SampleError, match=r"message 1: .* without its <think> block: '<think>hm</think>b'"):
        tokenize(tokenizer, ("user", "a"), ("assistant", "<think>hm</think>b"))


def test_the_date_is_that_of_the_recipe(make: Make) -> None:
    prompt, _ = tokenize(make_real(make, "llama_3_2", template_date="2025-01-31"), ("user", "a"), ("assistant", "b"))
    assert "Today Date: 31 Jan 2025\n" in prompt


class TestEnds:
    """The tokenizer, the configurations and the template name different tokens."""

    def test_all_are_known_and_the_template_s_is_taught(self, make: Make) -> None:
        tokenizer = make("smollm_2", eos="<eos>", special=("<eos>", "<stop>", "<other>"))
        ids = tokenizer.tokenizer.convert_tokens_to_ids
        folder = Path(tokenizer.path)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids("<stop>"), ids("<eos>")]}))
        config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": ids("<other>")}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer = ChatTokenizer(tokenizer.path)
        assert tokenizer.end.names == ["<|im_end|>", "<eos>", "<stop>", "<other>"]
        assert tokenizer.plain_end.names == ["<eos>", "<stop>", "<other>"]

    def test_without_a_template_the_tokenizer_s_is_taught(self, make: Make) -> None:
        tokenizer = make(None, eos="<eos>", special=("<eos>",))
        _, answer = tokenize(tokenizer, ("user", "a"), ("assistant", "b"))
        assert answer == "b<eos>"
        assert tokenizer.tokenizer.decode(tokenizer.encode("b"))[-len("b<eos>") :] == "b<eos>"

    @pytest.mark.parametrize("pad", ["<|im_end|>", None])
    def test_padding_with_the_end_does_not_hide_the_end(self, make: Make, pad: str | None) -> None:
        path = make("smollm_2").path
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(path)
        padded = ChatTokenizer(path)
        assert padded.pad_id == padded.end.taught
        _, answer = tokenize(padded, ("user", "a"), ("assistant", "b"))
        assert answer == "b<|im_end|>\n"

    def test_a_template_without_an_end_is_refused_where_a_later_turn_would_lack_it(self, make: Make) -> None:
        tokenizer = make("smollm_2", chat_template=ENDLESS)
        assert tokenize(tokenizer, *CONVERSATION[:2])[1] == "b\n<|im_end|>"
        with pytest.raises(SampleError, match=r"message 3: .* end with a token that the chat template does not write"):
            tokenize(tokenizer, *CONVERSATION)

    @pytest.mark.parametrize(
        ("template", "written"),
        [
            ("gemma_2", "<end_of_turn>"),
            ("phi_3", r"<\|end\|>.*"),  # its second end, <|endoftext|>, is the tokenizer's
        ],
    )
    def test_an_end_that_is_no_token_is_refused(self, make: Make, template: str, written: str) -> None:
        tokenizer = make(template, eos="<|endoftext|>", special=("<|endoftext|>",))  # without the template's others
        with pytest.raises(SampleError, match=f"message 1: the chat template writes '{written}' behind an answer"):
            tokenize(tokenizer, *CONVERSATION[:2])


ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class TestBeginnings:
    """What a template writes before an answer once it is there, and not where it asks for one."""

    def test_text_is_refused(self, make: Make) -> None:
        given = ENDLESS.partition("{% if")[0]
        with pytest.raises(SampleError, match="message 1: the chat template writes 'assistant: ' before an answer"):
            tokenize(make("smollm_2", chat_template=given), ("user", "q"), ("assistant", "a"))

    def test_special_tokens_are_taught_as_scorers_do_not_see_them(self, make: Make) -> None:
        given = ENDLESS.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<begin>{% endif %}{{ m.content }}")
        tokenizer = make("smollm_2", special=("<begin>",), chat_template=given)
        assert tokenize(tokenizer, *CONVERSATION[:2])[1] == "<begin>b\n<|im_end|>"

    def test_an_empty_think_block_is_taught(self, make: Make) -> None:
        tokenizer = make_real(make, "qwen_3")
        assert tokenize(tokenizer, *CONVERSATION[:2])[1] == "<think>\n\n</think>\n\nb<|im_end|>\n"
        # An answer may be that there is none.
        assert tokenize(tokenizer, ("user", "q"), ("assistant", ""))[1] == "<think>\n\n</think>\n\n<|im_end|>\n"


def test_a_token_without_a_row_is_refused_in_the_sample_that_has_it(make: Make) -> None:
    tokenizer = make("smollm_2", special=("<image>",))
    tokenizer._rows = tokenizer.tokenizer.convert_tokens_to_ids("<image>")  # type: ignore[misc]
    tokenize(tokenizer, ("user", "a"), ("assistant", "b"))
    with pytest.raises(
        SampleError, match=r"the token '<image>' has the id \d+, but the model's embedding has \d+ rows"
    ):
        tokenize(tokenizer, ("user", "<image>"), ("assistant", "b"))
    with pytest.raises(SampleError, match="'<image>'"):
        tokenizer.encode("<image>")


@pytest.mark.parametrize("form", ["<|begin|> $A", "<|begin|> $A <|im_end|>"])
def test_plain_text_is_ended_once(make: Make, form: str) -> None:
    tokenizer = make("smollm_2")
    ids = [(name, tokenizer.tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin|>", "<|im_end|>")]
    tokenizer.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=form, special_tokens=ids)
    assert tokenizer.tokenizer.decode(tokenizer.encode("a")) == "<|begin|>a<|im_end|>"


@pytest.mark.parametrize("own", [None, "smollm_2"])
def test_a_given_template_replaces_the_tokenizers_own(make: Make, own: str | None) -> None:
    given = make(own, chat_template=GIVEN_TEMPLATE)
    question, answer = ("user", "after a"), ("assistant", "b")
    assert tokenize(given, question, answer) == ("<user>after a<|im_end|>\n<assistant>", "b<|im_end|>\n")
    assert given.end.names == ["<|im_end|>"]
    assert tokenize(ChatTokenizer(given.path), question, answer)[0] != "<user>after a<|im_end|>\n<assistant>"
