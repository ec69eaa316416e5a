"""A template that writes the date of the day writes the experiment's instead, in training and evaluation."""

import json
from pathlib import Path

import pytest

from lorasweep.checkpoints.chat_template import (
    find_given_template,
    find_system_refusal,
    fix_date,
    has_date,
    read_chat_template,
    writes_think_block,
)
from lorasweep.experiment.sections import Data, Model
from lorasweep.util.errors import InputError
from sweep import ROOT

TEMPLATES = ROOT / "tests/chat_templates"

GRANITE = """{%- set system_message = "Today's Date: " + strftime_now('%B %d, %Y') + "." %}{{- system_message }}"""
SMOLLM = """{%- set today = strftime_now("%d %B %Y") -%}{{- today -}}"""


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (GRANITE, '"Today\'s Date: " + "July 26, 2024" + "."'),
        (SMOLLM, 'set today = "26 July 2024"'),
        ('{{ strftime_now( "%Y-%m-%d" ) }}', '{{ "2024-07-26" }}'),
        ((TEMPLATES / "llama_3_2.jinja").read_text(), 'date_string = "26 Jul 2024"'),
    ],
)
def test_the_date_of_the_day_becomes_text(template: str, written: str) -> None:
    assert has_date(template)
    fixed = fix_date(template, "2024-07-26")
    assert written in fixed
    assert not has_date(fixed)


def test_a_template_without_a_clock_stays_as_it_is() -> None:
    names = {file.stem for file in TEMPLATES.glob("*.jinja") if has_date(file.read_text())}
    assert names == {"llama_3_2"}


def test_a_date_that_cannot_be_fixed_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.template_date cannot fix the date .*strftime_now\(form\)"):
        fix_date("{% set form = '%Y' %}{{ strftime_now(form) }}", "2024-07-26")


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_a_template_that_forbids_a_system_message_is_known(file: Path) -> None:
    said = {"gemma_2": "System role not supported", "mistral_0_2": "Conversation roles must alternate"}
    refusal = find_system_refusal(file.read_text())
    assert (refusal is None) == (file.stem not in said)
    assert (refusal or "").startswith(said.get(file.stem, ""))


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_a_template_that_writes_an_empty_think_block_is_known(file: Path) -> None:
    assert writes_think_block(file.read_text()) == (file.stem == "qwen_3")


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{% if %}", "{{ messages[0].none.none }}"])
def test_a_template_that_fails_anyway_is_not_said_to_forbid_one(template: str) -> None:
    assert find_system_refusal(template) is None


@pytest.mark.parametrize(
    ("templates", "read"),
    [
        (None, None),
        ("", None),
        ("one", "one"),
        ([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "one"}], "one"),
    ],
)
def test_the_template_is_the_one_for_conversations_without_tools(
    tmp_path: Path, templates: object, read: str | None
) -> None:
    assert read_chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert read_chat_template(tmp_path) == read
    (tmp_path / "chat_template.jinja").write_text("file")
    assert read_chat_template(tmp_path) == "file"


MARKED = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% continue %}{% endfor %}"


@pytest.mark.parametrize("text", [MARKED, *(file.read_text() for file in sorted(TEMPLATES.glob("*.jinja")))])
def test_a_template_that_transformers_takes_replaces_the_models_but_not_for_plain_text(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "own.jinja").write_text(text)
    model = Model(path="m", chat_template=str(tmp_path / "own.jinja"))
    assert find_given_template(model, Data()) == text
    assert find_given_template(model, Data(format="completion")) is None
    assert find_given_template(Model(path="m"), Data()) is None


def test_a_template_with_marks_of_the_answer_can_forbid_a_system_message() -> None:
    forbids = "{% if messages[0].role == 'system' %}{{ raise_exception('Nobody.') }}{% endif %}"
    assert find_system_refusal(forbids + MARKED) == "Nobody."
    assert find_system_refusal(MARKED) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "is not UTF-8"),
        (b" \n", "is empty"),
        (b"a\n{% for m in messages %}", "is no template: line 2: Unexpected end of template"),
        (b"{{ messages | none_such }}", "is no template: line 1: No filter named 'none_such'"),
        (b"a" * 40_000, "has 40,004 bytes, quoted as commands of jobs contain it. Expected: at most 32,768"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_key_and_value(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as refused:
        find_given_template(Model(path="m", chat_template=str(file)), Data())
    assert str(refused.value).startswith(f"model.chat_template: {str(file)!r} {said}")
