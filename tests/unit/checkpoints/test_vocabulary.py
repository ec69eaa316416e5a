"""A tokenizer that evaluation cannot read, or with a token that the embedding has no row for, is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.vocabulary import check_open_end, check_readable, check_vocabulary, count_rows
from lorasweep.util.errors import InputError
from plain_checkpoint import write_checkpoint

ROWS = 32


def make(folder: Path, settings: dict[str, Any] | None = None, tokenizer: dict[str, Any] | None = None) -> Checkpoint:
    write_checkpoint(folder, vocab_size=ROWS)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer or {}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages }}<end>", **(settings or {})})
    )
    return read_checkpoint(folder)


def add(number: int, text: str, special: bool = True) -> dict[str, Any]:
    return {"added_tokens": [{"id": number, "content": text, "special": special}]}


@pytest.mark.parametrize(
    ("settings", "tokenizer"),
    [
        ({}, {}),
        ({}, {"model": {"vocab": {"a": 0, "b": ROWS - 1}}, **add(5, "<pad>")}),
        ({}, add(ROWS, "<image>")),  # as Gemma 3's: nothing but a text that spells it has this token
        ({"added_tokens_decoder": {"40": {"content": "<image>", "special": True}}}, {}),
    ],
)
def test_a_token_without_a_row_that_cannot_occur_is_accepted(
    tmp_path: Path, settings: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    checkpoint = make(tmp_path / "model", settings, tokenizer)
    assert count_rows(checkpoint) == ROWS
    check_vocabulary(checkpoint)


@pytest.mark.parametrize(
    ("settings", "tokenizer", "token", "number"),
    [
        ({}, {"model": {"vocab": {"a": 0, "b": ROWS}}}, "b", ROWS),
        ({}, {"model": {"vocab": [[str(n), -1.0] for n in range(ROWS + 3)]}}, "34", 34),
        ({}, add(ROWS, "word", special=False), "word", ROWS),
        ({}, add(ROWS, "<end>"), "<end>", ROWS),  # the template writes it
        ({"pad_token": "<pad>"}, add(ROWS, "<pad>"), "<pad>", ROWS),
        ({"pad_token": {"content": "<pad>"}}, add(ROWS, "<pad>"), "<pad>", ROWS),
        ({"eos_token": "<e>", "added_tokens_decoder": {"40": {"content": "<e>", "special": True}}}, {}, "<e>", 40),
    ],
)
def test_a_token_without_a_row_is_refused(
    tmp_path: Path, settings: dict[str, Any], tokenizer: dict[str, Any], token: str, number: int
) -> None:
    checkpoint = make(tmp_path / "model", settings, tokenizer)
    with pytest.raises(InputError) as error:
        check_vocabulary(checkpoint)
    assert f"the token '{token}' with the id {number}, but the model's embedding has {ROWS} rows" in str(error.value)
    assert f"at least {number + 1} rows" in str(error.value)


SENTENCEPIECE, TIKTOKEN = b"\n\x0e\n\x05<unk>", b"IQ== 0\n"


@pytest.mark.parametrize(
    ("files", "is_readable"),
    [
        ({"tokenizer.model": SENTENCEPIECE}, False),
        ({"spiece.model": SENTENCEPIECE, "special_tokens_map.json": b"{}"}, False),
        ({"tokenizer.model": SENTENCEPIECE, "tokenizer.json": b"{}"}, True),
        ({"tokenizer.model": TIKTOKEN}, True),
        ({"vocab.json": b"{}", "merges.txt": b""}, True),
    ],
)
def test_a_tokenizer_that_only_torchtunes_environment_can_read_is_refused(
    tmp_path: Path, files: dict[str, bytes], is_readable: bool
) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if is_readable:
        check_readable(read_checkpoint(folder))
        return
    with pytest.raises(
        InputError, match=r"has its tokenizer as \w+\.model alone.* Expected: tokenizer\.json\. To write it"
    ):
        check_readable(read_checkpoint(folder))


BEHIND: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({}, {}, False),
    ({}, {"type": "ByteLevel"}, False),
    ({}, {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}, False),
    ({}, {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}]}, True),
    ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "RobertaProcessing"}]}, True),
    ({"add_eos_token": True}, {}, True),
]


@pytest.mark.parametrize(("settings", "processor", "ends"), BEHIND)
def test_a_tokenizer_that_ends_every_text_is_refused_where_it_would_end_prompts(
    tmp_path: Path, settings: dict[str, Any], processor: dict[str, Any], ends: bool
) -> None:
    checkpoint = make(tmp_path / "model", settings, {"post_processor": processor or None})
    if ends:
        with pytest.raises(InputError, match="writes a token behind every text, so also behind a prompt"):
            check_open_end(checkpoint)
    else:
        check_open_end(checkpoint)
