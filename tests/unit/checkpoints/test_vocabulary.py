"""A tokenizer with a token that the embedding has no row for is refused by name, before any job."""

import json
from pathlib import Path
from typing import Any

import pytest

from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.checkpoints.vocabulary import check_vocabulary, count_rows
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
