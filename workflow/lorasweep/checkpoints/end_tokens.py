"""The tokens that end an answer. Checkpoints name them in several places, which often disagree."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.json_files import find_json
from lorasweep.util.errors import InputError

_ANSWER = "answer"


@dataclass(frozen=True)
class EndTokens:
    """The tokens that end an answer."""

    taught: int
    """The token with which training ends every answer that has none."""
    ids: tuple[int, ...]
    """All tokens at which generation stops; `taught` is the first."""
    names: list[str]
    """The same tokens as text, for records."""


def find_end_tokens(tokenizer: Any, folder: Path, template: str | None) -> EndTokens:
    """Return the tokens that end an answer of the model in `folder`.

    `tokenizer` is transformers' tokenizer of the model. `template` is the chat template; `None` for plain text.

    Training teaches the special token that the template writes after an answer, else the tokenizer's end token, else
    the first of the configurations. Each of these, and of those in `generation_config.json` and `config.json`, ends an
    answer.

    Raises:
        InputError: No file names an end token.
    """
    written = _find_written(tokenizer, template) if template else None
    candidates = [written, tokenizer.eos_token_id, *_read_configured(folder)]
    ids = tuple(dict.fromkeys(token for token in candidates if token is not None))
    if not ids:
        raise InputError(
            f"{folder}: no token ends an answer",
            "eos_token in tokenizer_config.json, or eos_token_id in generation_config.json or config.json",
        )
    return EndTokens(ids[0], ids, tokenizer.convert_ids_to_tokens(list(ids)))


def find_added_end(tokenizer: Any) -> str | None:
    """Return the token that a tokenizer adds behind every text, also a prompt; `None` if it adds none."""
    plain, whole = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    return None if whole[-len(plain) :] == plain else str(tokenizer.decode(whole[-1:]))


def _find_written(tokenizer: Any, template: str) -> int | None:
    """Return the first special token that a template writes after an answer; `None` if it writes none."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except (TemplateError, TypeError):  # the same template is refused by name with the first sample
        return None
    _, found, rest = text.rpartition(_ANSWER)
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    tokens = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in tokens if token in special), None)


def _read_configured(folder: Path) -> Iterator[int]:
    for name in ("generation_config.json", "config.json"):
        content = find_json(folder / name)
        for section in (content, content.get("text_config") or {}):
            ids = section.get("eos_token_id")
            yield from ids if isinstance(ids, list) else [] if ids is None else [ids]
