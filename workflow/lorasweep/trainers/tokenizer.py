"""Tokenize samples for a training: the checkpoint's tokenizer with its chat template, or with one that replaces it.

A prompt has the same tokens here as in Inspect's `hf` provider, so that training and evaluation agree. A sample for
which they could not is refused.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer

from lorasweep.checkpoints.chat_template import EMPTY_THINK_BLOCK, fix_date, get_default_template
from lorasweep.checkpoints.checkpoint import read_checkpoint
from lorasweep.checkpoints.end_tokens import EndTokens, find_end_tokens
from lorasweep.checkpoints.vocabulary import count_rows
from lorasweep.util.errors import InputError

_SHOWN = 60
"""The most characters of a text that a message shows."""


class SampleError(InputError):
    """A training sample cannot be rendered or tokenized as evaluation would."""


class Message(NamedTuple):
    """A message of a conversation."""

    role: str
    content: str
    is_learnt: bool


class ChatTokenizer:
    """Tokenize conversations, and tell which tokens are learnt.

    Each answer is tokenized separately from the text before it, since generation starts there. Without a chat template
    a message is `<role>: <text>` and a line break, as in Inspect. Every answer ends with a token at which generation
    stops: one is appended if the template writes none.

    Args:
        path: the checkpoint directory.
        max_seq_len: the most tokens of a sample, kept here for the dataset, which cuts; `None`: no limit.
        prompt_template: template of user messages; `{input}` stands for the message. `None`: the message as it is.
        template_date: the date that the chat template writes, as YYYY-MM-DD; `None`: that of the day.
        chat_template: the text of a chat template that replaces the checkpoint's own; `None`: none does.
    """

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,
        prompt_template: str | None = None,
        template_date: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.path = path
        self.max_seq_len = max_seq_len
        self.prompt_template = prompt_template or "{input}"
        template = get_default_template(self.tokenizer.chat_template) if chat_template is None else chat_template
        self.template = fix_date(template, template_date) if template and template_date else template
        self.plain_end = find_end_tokens(self.tokenizer, Path(path), None)
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else self.plain_end.taught

    @cached_property
    def end(self) -> EndTokens:
        """The tokens that end an answer in a conversation; those that end plain text are `plain_end`."""
        return find_end_tokens(self.tokenizer, Path(self.path), self.template)

    @cached_property
    def _rows(self) -> int | None:
        return count_rows(read_checkpoint(Path(self.path)))

    def tokenize_conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation that ends with an answer, and for each whether it is learnt.

        Raises:
            SampleError: the chat template refuses the messages, changes one of them, or changes earlier text when
                messages are added; or a token has no row in the embedding.
        """
        plain = [{"role": message.role, "content": self._fill(message)} for message in messages]
        tokens: list[int] = []
        is_learnt: list[bool] = []
        done, start, is_ended = "", 0, False
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, full = self._render(plain[:index], asks=True), self._render(plain[: index + 1], asks=False)
            self._check_text(done, prompt, full, plain, start, index)
            self._check_answer(full[len(prompt) :], plain[index]["content"], index)
            question = self._encode(prompt[len(done) :], is_start=not tokens)
            if tokens and tokens + question != self._encode(prompt, is_start=True):
                why = "have other tokens alone than in the conversation, which evaluation tokenizes as a whole"
                if is_ended:
                    why = "end with a token that the chat template does not write, so that evaluation lacks it"
                raise SampleError(
                    f"{self.path}: message {index}: the answers before it {why}",
                    "one question and one answer in each sample, or another chat template",
                )
            answer = self._encode(full[len(prompt) :], is_start=False)
            if is_ended := not set(answer) & set(self.end.ids):
                answer.append(self.end.taught)
            tokens += question + answer
            is_learnt += [any(m.is_learnt for m in messages[start:index])] * len(question)
            is_learnt += [message.is_learnt] * len(answer)
            done, start = full, index + 1
        self._check_tokens(tokens)
        return tokens, is_learnt

    def tokenize_text(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the tokens of plain text.

        Raises:
            SampleError: a token has no row in the embedding.
        """
        tokens: list[int] = list(self.tokenizer(text, add_special_tokens=add_bos)["input_ids"])
        if add_eos and tokens[-1] not in self.plain_end.ids:
            tokens.append(self.plain_end.taught)
        self._check_tokens(tokens)
        return tokens

    def _fill(self, message: Message) -> str:
        return self.prompt_template.format(input=message.content) if message.role == "user" else message.content

    def _render(self, messages: Sequence[Mapping[str, str]], asks: bool) -> str:
        """Return messages as text; with `asks`, followed by the start of an answer."""
        if self.template is None:
            last = "" if asks else messages[-1]["content"]
            before = messages if asks else messages[:-1]
            return "".join(f"{message['role']}: {message['content']}\n" for message in before) + last
        try:
            # enable_thinking as in Inspect's provider.
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=asks,
                tools=None,
                enable_thinking=None,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise SampleError(
                f"{self.path}: the chat template refuses the messages ({roles}): {error}",
                "roles that the template has; no data.system_prompt, if it has no system role",
            ) from error
        return str(text)

    def _check_text(
        self, done: str, prompt: str, full: str, plain: Sequence[Mapping[str, str]], start: int, index: int
    ) -> None:
        """Check a question and its answer, messages `start` to `index`, in the rendered conversation.

        `done` is the text up to the earlier answer, `prompt` that up to this answer, and `full` that with the answer.
        """
        for number, before, after in ((start, done, prompt), (index, prompt, full)):
            if not after.startswith(before):
                at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
                raise SampleError(
                    f"{self.path}: message {number}: the chat template writes earlier messages otherwise once this "
                    "one is added, so that training and evaluation would have different prompts: "
                    f"{_shorten(before[at:])} becomes {_shorten(after[at:])}",
                    "one question and one answer in each sample, or another chat template",
                )
        for number in range(start, index + 1):
            content, role = plain[number]["content"], plain[number]["role"]
            text = full[len(prompt) :] if number == index else prompt[len(done) :]
            if content in text:
                continue
            if content.strip() in text:
                how, expected = "without the blanks at its edges", "the message without them"
            elif "<think>" in content:
                how, expected = "without its <think> block", "the message as the template writes it"
            else:
                how, expected = "otherwise than it is", "a message that the template writes as it is"
            raise SampleError(
                f"{self.path}: message {number}: the chat template writes the {role} message {how}: "
                f"{_shorten(content)}",
                expected,
            )

    def _check_answer(self, taught: str, content: str, number: int) -> None:
        """Check that scorers would see the answer alone in what is taught: apart from blanks, and an empty think block.

        They see no special tokens, and nothing behind a token that ends the answer.
        """
        start, content = self._skip(taught), content[self._skip(content) :].rstrip()
        if not (content and taught.startswith(content, start)) and (block := EMPTY_THINK_BLOCK.match(taught, start)):
            start = block.end()
        ends = (taught.find(end, start + len(content)) for end in self._ends)
        seen = taught[start : min((end for end in ends if end >= 0), default=None)].rstrip()
        if seen == content:
            return
        if seen.endswith(content) or not seen.startswith(content):
            header = _shorten(seen.removesuffix(content) if seen.endswith(content) else seen.partition(content)[0])
            raise SampleError(
                f"{self.path}: message {number}: the chat template writes {header} before an answer, but not where it "
                "asks for one, so that this text would be part of every answer",
                f"model.chat_template: a template that writes {header} behind the prompt, if add_generation_prompt",
            )
        raise SampleError(
            f"{self.path}: message {number}: the chat template writes {_shorten(seen.removeprefix(content).lstrip())} "
            "behind an answer before any token that ends one, so that this text would be part of every answer",
            f"model.chat_template: a template that writes {{{{ eos_token }}}} ({self.end.names[0]}) behind an answer, "
            "or nothing",
        )

    def _skip(self, text: str) -> int:
        """Return where a text begins behind blanks and special tokens."""
        match = self._unseen.match(text)
        assert match
        return match.end()

    @cached_property
    def _unseen(self) -> re.Pattern[str]:
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        names = sorted({*self.tokenizer.all_special_tokens, *added}, reverse=True)  # the longest of those alike first
        return re.compile("(?:" + "|".join((r"\s", *map(re.escape, names))) + ")*")

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        texts = (self.tokenizer.decode([token]).strip() for token in self.end.ids)
        return tuple(filter(None, texts))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        if self._rows is not None and max(tokens, default=0) >= self._rows:
            token = max(tokens)
            raise SampleError(
                f"{self.path}: the token {self.tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but the "
                f"model's embedding has {self._rows} rows",
                "a sample without this token",
            )

    def _encode(self, text: str, is_start: bool) -> list[int]:
        # A chat template writes the special tokens itself.
        special = is_start and self.template is None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def _shorten(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
