"""The chat template in a checkpoint directory, and the date that it writes into prompts.

A template that calls `strftime_now` gives another prompt each day. Its calls are replaced by one date, as text, so that
every library that renders the template writes the same.
"""

import json
import re
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from lorasweep.checkpoints.json_files import find_json
from lorasweep.util.errors import InputError

_CALL = "strftime_now("
_LITERAL_CALL = re.compile(r"""strftime_now\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")


def read_chat_template(folder: Path) -> str | None:
    """Return the chat template that transformers uses for a folder's tokenizer; `None` if there is none.

    Of several templates, it is the one named `default`, as for a conversation without tools.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return get_default_template(find_json(folder / "tokenizer_config.json").get("chat_template"))


def get_default_template(templates: Any) -> str | None:
    """Return the template for a conversation without tools, of one template, or of several by name."""
    if isinstance(templates, list):
        templates = {template["name"]: template["template"] for template in templates}
    if isinstance(templates, dict):
        templates = templates.get("default")
    return templates or None


def find_system_refusal(template: str) -> str | None:
    """Return what a template says when it refuses a system message; `None` if it takes one, or fails without too."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    said: list[str] = []

    def refuse(message: str) -> None:
        said.append(message)
        raise TemplateError(message)

    # As transformers renders it, as far as a conversation without tools needs.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
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
