"""The tokenizer of torchtune's recipes: lorasweep's, with the methods that torchtune's datasets call."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtune import data

from lorasweep.trainers import tokenizer


class ChatTokenizer(tokenizer.ChatTokenizer):
    """Tokenize torchtune's messages, with a mask of the tokens that are not learnt."""

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Replace `messages` in a sample by `tokens` and `mask`. torchtune calls this for each sample."""
        sample = dict(sample)
        tokens, mask = self.tokenize_messages(sample.pop("messages"))
        return {**sample, "tokens": tokens, "mask": mask}

    def tokenize_messages(self, messages: Sequence[data.Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation, and for each whether the loss ignores it."""
        plain = [tokenizer.Message(m.role, str(m.text_content), not m.masked) for m in messages]
        tokens, is_learnt = self.tokenize_conversation(plain)
        return tokens, [not learnt for learnt in is_learnt]

    def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
        """Return the tokens of plain text, for torchtune's text completion."""
        return self.tokenize_text(text, add_bos, add_eos)
