"""Check a checkpoint's tokenizer by its files: evaluation must be able to read it, and a token needs a row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.chat_template import TOKENIZER_CONFIG
from lorasweep.checkpoints.checkpoint import Checkpoint, choose_files
from lorasweep.checkpoints.json_files import find_json
from lorasweep.util.errors import InputError

_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)
_READABLE = ("tokenizer.json", "vocab*.json", "vocab*.txt")
_SENTENCEPIECE = ("*.model", "*.spm")
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def count_rows(checkpoint: Checkpoint) -> int | None:
    """Return the number of tokens that a model's embedding has rows for; `None` if it cannot be told."""
    rows = [tensor.shape[0] for name, tensor in checkpoint.tensors.items() if name.endswith(_EMBEDDINGS)]
    size = checkpoint.config.get("vocab_size") or (checkpoint.config.get("text_config") or {}).get("vocab_size")
    return max(rows) if rows else size


def check_readable(checkpoint: Checkpoint) -> None:
    """Check that a tokenizer can be read without the package sentencepiece, which only torchtune's environment has.

    Raises:
        InputError: it cannot.
    """
    names, path = checkpoint.tokenizer_files, checkpoint.path
    if choose_files(names, _READABLE):
        return
    for name in choose_files(names, _SENTENCEPIECE):
        with (path / name).open("rb") as file:
            is_protobuf = file.read(1) == b"\n"  # a tokenizer.model of Llama 3 is text, which can be read
        if is_protobuf:
            program = (
                f"from transformers import AutoTokenizer as T; T.from_pretrained('{path}').save_pretrained('{path}')"
            )
            raise InputError(
                f"'{path}' has its tokenizer as {name} alone, which evaluation and the trainer trl cannot read",
                f'tokenizer.json. To write it: .venv/train/bin/python -c "{program}"',
            )


def check_open_end(checkpoint: Checkpoint) -> None:
    """Check that a tokenizer writes no token behind every text: a prompt of plain text would have it too.

    Raises:
        InputError: it does.
    """
    settings, tokenizer = (find_json(checkpoint.path / name) for name in (TOKENIZER_CONFIG, "tokenizer.json"))
    if settings.get("add_eos_token") or _ends_texts(tokenizer.get("post_processor")):
        raise InputError(
            f"'{checkpoint.path}': the tokenizer writes a token behind every text, so also behind a prompt of "
            "data.format: completion",
            "a tokenizer that does not (post_processor in tokenizer.json, add_eos_token in tokenizer_config.json)",
        )


def _ends_texts(processor: Any) -> bool:
    """Whether a `post_processor` of tokenizer.json writes a token behind a text."""
    kind = (processor or {}).get("type")
    if kind == "Sequence":
        return any(map(_ends_texts, processor["processors"]))
    return kind in ("BertProcessing", "RobertaProcessing") or (
        kind == "TemplateProcessing" and "SpecialToken" in processor["single"][-1]
    )


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
