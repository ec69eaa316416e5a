"""Compare a checkpoint's tokenizer with its embedding, by the files' headers: a token needs a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.chat_template import TOKENIZER_CONFIG
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.json_files import find_json
from lorasweep.util.errors import InputError

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def count_rows(checkpoint: Checkpoint) -> int | None:
    """Return the number of tokens that a model's embedding has rows for; `None` if it cannot be told."""
    rows = [tensor.shape[0] for name, tensor in checkpoint.tensors.items() if name.endswith(_EMBEDDINGS)]
    size = checkpoint.config.get("vocab_size") or (checkpoint.config.get("text_config") or {}).get("vocab_size")
    return max(rows) if rows else size


def check_vocabulary(checkpoint: Checkpoint) -> None:
    """Check that every token that can occur has a row in the embedding.

    A special token that neither the chat template nor a setting of the tokenizer names occurs only in a text that
    spells it, and is refused there.

    Raises:
        InputError: A token has no row. On a GPU, it would end the job with `CUDA error`.
    """
    rows = count_rows(checkpoint)
    if rows is None:
        return
    settings = find_json(checkpoint.path / TOKENIZER_CONFIG)
    roles = {_get_text(settings.get(role)) for role in _ROLES}
    template = checkpoint.chat_template or ""
    beyond = {
        token: number
        for number, token, is_special in _list_tokens(checkpoint.path, settings)
        if number >= rows and (not is_special or token in roles or token in template)
    }
    if beyond:
        token, number = max(beyond.items(), key=lambda item: item[1])
        raise InputError(
            f"'{checkpoint.path}': the tokenizer has the token {token!r} with the id {number}, but the model's "
            f"embedding has {rows} rows",
            f"a model of at least {number + 1} rows (transformers: resize_token_embeddings), or its own tokenizer",
        )


def _list_tokens(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """Yield the id and the text of tokens, and whether each is special; of the vocabulary, only the last token."""
    tokenizer = find_json(folder / "tokenizer.json")
    vocabulary = tokenizer.get("model", {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # of a Unigram model: pairs of a text and a score, in order
        vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
    added = {int(entry["id"]): entry for entry in tokenizer.get("added_tokens", [])}
    added |= {int(number): entry for number, entry in settings.get("added_tokens_decoder", {}).items()}
    added |= {
        number: {"content": text}
        for text, number in find_json(folder / "added_tokens.json").items()
        if number not in added
    }
    for number, entry in added.items():
        yield number, entry["content"], bool(entry.get("special"))
    plain = ((number, text) for text, number in vocabulary.items() if number not in added)
    if last := max(plain, default=None):
        yield last[0], last[1], False


def _get_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
