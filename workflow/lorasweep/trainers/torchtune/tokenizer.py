"""Tokenizer for torchtune's recipes: the checkpoint's tokenizer with its chat template.

A prompt has the same tokens here as in Inspect's `hf` provider, so that training and evaluation agree.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchtune.data import Message
from transformers import AutoTokenizer


class ChatTokenizer:
    """Tokenize messages, with a mask of the tokens that are not learnt.

    Each answer is tokenized separately from the text before it, since generation starts there. Without a chat template
    a message is `<role>: <text>` and a line break, as in Inspect. Every answer ends with a stop token of generation:
    one is appended if the template writes none.

    Args:
        path: the checkpoint directory.
        max_seq_len: the most tokens of a sample, kept here for the dataset, which cuts; `None`: no limit.
        prompt_template: template of user messages; `{input}` stands for the message. `None`: the message as it is.
    """

    def __init__(self, path: str, max_seq_len: int | None = None, prompt_template: str | None = None) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.path = path
        self.max_seq_len = max_seq_len
        self.prompt_template = prompt_template or "{input}"
        pad = self.tokenizer.pad_token_id
        self.stop_ids = _read_stop_ids(path) or [self.tokenizer.eos_token_id]
        self.pad_id: int = pad if pad is not None else self.tokenizer.eos_token_id

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace `messages` in a sample by `tokens` and `mask`. torchtune calls this for each sample."""
        sample = dict(sample)
        tokens, mask = self.tokenize_messages(sample.pop("messages"))
        return {**sample, "tokens": tokens, "mask": mask}

    def tokenize_messages(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation that ends with an answer, and for each whether the loss ignores it.

        Raises:
            ValueError: the chat template changes earlier text when messages are added.
        """
        plain = [{"role": message.role, "content": self._fill(message)} for message in messages]
        tokens: list[int] = []
        mask: list[bool] = []
        done, start = "", 0
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            prompt, full = self._render(plain[:index], asks=True), self._render(plain[: index + 1], asks=False)
            if not prompt.startswith(done) or not full.startswith(prompt):
                raise ValueError(
                    f"{self.path}: the chat template changes the prompt when the answer is added, so training and "
                    f"evaluation would have different prompts: {prompt[-200:]!r} becomes {full[-200:]!r}"
                )
            question = self._encode(prompt[len(done) :], is_start=not tokens)
            answer = self._encode(full[len(prompt) :], is_start=False)
            if not set(answer) & set(self.stop_ids):
                answer.append(self.stop_ids[0])
            tokens += question + answer
            mask += [all(m.masked for m in messages[start:index])] * len(question) + [message.masked] * len(answer)
            done, start = full, index + 1
        return tokens, mask

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the tokens of plain text, for torchtune's text completion."""
        tokens: list[int] = list(self.tokenizer(text, add_special_tokens=add_bos)["input_ids"])
        if add_eos and tokens[-1] not in self.stop_ids:
            tokens.append(self.stop_ids[0])
        return tokens

    def _fill(self, message: Message) -> str:
        text = str(message.text_content)
        return self.prompt_template.format(input=text) if message.role == "user" else text

    def _render(self, messages: Sequence[Mapping[str, str]], asks: bool) -> str:
        """Return messages as text; with `asks`, followed by the start of an answer."""
        if self.tokenizer.chat_template is None:
            last = "" if asks else messages[-1]["content"]
            before = messages if asks else messages[:-1]
            return "".join(f"{message['role']}: {message['content']}\n" for message in before) + last
        # enable_thinking as in Inspect's provider.
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=asks, tools=None, enable_thinking=None
        )
        return str(text)

    def _encode(self, text: str, is_start: bool) -> list[int]:
        # A chat template writes the special tokens itself.
        special = is_start and self.tokenizer.chat_template is None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])


def _read_stop_ids(path: str) -> list[int]:
    """Return the stop tokens in the checkpoint's generation_config.json; an empty list if there are none."""
    file = Path(path, "generation_config.json")
    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return list(ids) if isinstance(ids, list) else [] if ids is None else [ids]
