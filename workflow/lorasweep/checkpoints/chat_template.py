"""The chat template of a model, in its directory or in a file that replaces it, and the date that it writes.

A template that calls `strftime_now` gives another prompt each day. Its calls are replaced by one date, as text, so that
every library that renders the template writes the same.
"""

import json
import re
import shlex
from contextlib import suppress
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasweep.checkpoints.json_files import find_json
from lorasweep.layout import RECORD, TEMPLATE_DIGEST
from lorasweep.util.digest import digest_file
from lorasweep.util.errors import InputError
from lorasweep.util.files import find_record

if TYPE_CHECKING:
    from lorasweep.experiment.sections import Data, Model

CHAT_TEMPLATE = "chat_template.jinja"
"""transformers' name for the file of a tokenizer's chat template."""

TOKENIZER_CONFIG = "tokenizer_config.json"
"""transformers' name for the file of a tokenizer's settings."""

_MOST_BYTES = 32 * 1024
"""The most bytes of a template, quoted. Commands contain it, and are limited to 128 KiB."""

EMPTY_THINK_BLOCK = re.compile(r"<think>\s*</think>\s*")
"""What some templates write before an answer that has no reasoning."""

_CALL = "strftime_now("
_LITERAL_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template that transformers uses for a folder's tokenizer; `None` if there is none.

    Of several templates, it is the one named `default`, as for a conversation without tools.
    """
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return get_default_template(find_json(folder / TOKENIZER_CONFIG).get("chat_template"))


def get_default_template(templates: Any) -> str | None:
    """Return the template for a conversation without tools, of one template, or of several by name."""
    if isinstance(templates, list):
        templates = {template["name"]: template["template"] for template in templates}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates or None


def find_given_template(model: "Model", data: "Data", key: str = "model.chat_template") -> str | None:
    """Return the text of the template that replaces a model's own for this data.

    `None` if the experiment names none, or prompts are plain text. `key` is where it names one, for messages.

    Raises:
        InputError: there is no such file, or transformers could not use its text as a chat template.
    """
    if model.chat_template is None or data.format == "completion":
        return None
    problem, expected = f"{key}: {model.chat_template!r}", "a file with a chat template in Jinja"
    try:
        template = Path(model.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{problem} cannot be read: {error.strerror}", expected) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{problem} is not UTF-8: {error}", expected) from error
    if not template.strip():
        raise InputError(f"{problem} is empty", expected)
    size = len(shlex.quote(json.dumps(template, ensure_ascii=False)).encode())
    if size > _MOST_BYTES:
        raise InputError(
            f"{problem} has {size:,} bytes, quoted as commands of jobs contain it", f"at most {_MOST_BYTES:,}"
        )
    if fault := _find_fault(template):
        raise InputError(f"{problem} is no template: {fault}", expected)
    return template


def read_kept_template(adapter: Path) -> str | None:
    """Return the text of the template that replaces the base model's own for an adapter, as the adapter's folder says.

    `None` if its record has none.

    Raises:
        InputError: the template is not the one on record.
    """
    expected = find_record(adapter / RECORD).get(TEMPLATE_DIGEST)
    if not expected:
        return None
    file = adapter / CHAT_TEMPLATE
    if not file.is_file() or digest_file(file) != expected:
        raise InputError(f"{file}: is not the chat template that {RECORD} names", "the folder as it was made")
    return file.read_text(encoding="utf-8")


@lru_cache
def _find_fault(template: str) -> str:
    from jinja2 import TemplateSyntaxError

    try:
        _make_environment().from_string(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    return ""


def _make_environment() -> Any:
    """Return an environment that compiles and renders as that of transformers, for a conversation without tools."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The block in which transformers marks an answer's tokens, here without the marks."""

        tags = {"generation"}  # noqa: RUF012  as Jinja has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )


def find_system_refusal(template: str) -> str | None:
    """Return what a template says when it refuses a system message; `None` if it takes one, or fails without too."""
    from jinja2 import TemplateError

    said: list[str] = []

    def refuse(message: str) -> None:
        said.append(message)
        raise TemplateError(message)

    environment = _make_environment()
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: form)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    tokens = {"bos_token": "", "eos_token": ""}
    try:
        compiled = environment.from_string(template)
        compiled.render(messages=chat[1:], add_generation_prompt=True, **tokens)
    except (TemplateError, TypeError):
        return None
    with suppress(TemplateError, TypeError):
        compiled.render(messages=chat, add_generation_prompt=True, **tokens)
    return said[0] if said else None


def writes_think_block(template: str) -> bool:
    """Whether a template writes an empty think block before an answer, and not where it asks for one."""
    from jinja2 import TemplateError

    environment = _make_environment()
    environment.globals.update(strftime_now=lambda form: form)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    variables = {"bos_token": "", "eos_token": "", "enable_thinking": None}
    try:
        compiled = environment.from_string(template)
        prompt = compiled.render(messages=chat[:1], add_generation_prompt=True, **variables)
        full = compiled.render(messages=chat, add_generation_prompt=False, **variables)
    except (TemplateError, TypeError):  # the same template is refused by name with the first sample
        return False
    return full.startswith(prompt) and EMPTY_THINK_BLOCK.match(full, len(prompt)) is not None


def has_date(template: str | None) -> bool:
    """Whether a template writes the date of the day."""
    return _CALL in (template or "")


def fix_date(template: str, day: str) -> str:
    """Return a template with `day`, as YYYY-MM-DD, in place of the date of the day.

    Raises:
        InputError: The template computes the format of the date.
    """
    moment = date.fromisoformat(day)
    fixed = _LITERAL_CALL.sub(lambda call: json.dumps(moment.strftime(call[1][1:-1])), template)
    if has_date(fixed):
        raise InputError(
            f"data.template_date cannot fix the date in the chat template: {fixed[fixed.index(_CALL) :][:60]!r}",
            "strftime_now with its format as text, or a template without a date",
        )
    return fixed
