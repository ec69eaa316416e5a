"""How models are asked: one system message, one date, an end at every end token, and only tokens that the model has."""

from collections.abc import Callable
from typing import Any

from lorasweep.checkpoints.chat_template import fix_date, has_date
from lorasweep.checkpoints.checkpoint import Checkpoint
from lorasweep.checkpoints.end_tokens import EndTokens, find_added_end, find_end_tokens
from lorasweep.checkpoints.vocabulary import count_rows
from lorasweep.evaluation.spec import EvaluationSpec, TaskSpec
from lorasweep.util.errors import InputError

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that outputs the messages' text alone."""

PREFIX_VARIABLE = "assistant_prefix"
"""The variable of a chat template of a server that has the text with which an answer begins."""

_VARIABLES = "chat_template_kwargs"
"""The parameter of a request to vLLM that has variables of the chat template."""

_THINKING = "enable_thinking"
"""A variable of some chat templates. In training and in Inspect's provider `hf` it is there, and is None."""


def get_replacement(checkpoint: Checkpoint, day: str | None) -> str | None:
    """Return the chat template to ask with in place of the tokenizer's: a given one, or its own with a fixed date.

    `None` if its own is used as it is.
    """
    template = checkpoint.chat_template
    return fix_date(template, day) if template and day and has_date(template) else checkpoint.given_template


def prepare(api: Any, checkpoint: Checkpoint) -> None:
    """Set up a model of the provider `hf` that was loaded from a checkpoint, or from one with the same tokenizer.

    Its answers end at every token that may end one; they are on record as `api.end_tokens`. A prompt with a token that
    the embedding has no row for is refused by name: a GPU would fail with `CUDA error`, and so would all later points.
    """
    template = api.chat_template or checkpoint.chat_template
    ends = find_end_tokens(api.tokenizer, checkpoint.path, None if template == PLAIN else template)
    if template == PLAIN and (end := find_added_end(api.tokenizer)):
        raise InputError(
            f"{checkpoint.path}: the tokenizer writes {end!r} behind every text, so also behind a prompt",
            "a tokenizer that does not (post_processor in tokenizer.json)",
        )
    api.end_tokens = ends.names
    if api.tokenizer.pad_token_id is None:
        api.tokenizer.pad_token_id = ends.taught
    config = api.model.generation_config
    # Padding follows the end of an answer. As a special token, it is left out of the text.
    config.eos_token_id, config.pad_token_id = list(ends.ids), api.tokenizer.pad_token_id
    rows = count_rows(checkpoint)
    if rows is not None:
        api.model.generate = _refuse_beyond(rows, api.tokenizer, checkpoint, api.model.generate)


def _refuse_beyond(rows: int, tokenizer: Any, checkpoint: Checkpoint, generate: Callable[..., Any]) -> Any:
    def generate_known(*, input_ids: Any, **arguments: Any) -> Any:
        if int(input_ids.max()) >= rows:
            token = tokenizer.convert_ids_to_tokens(int(input_ids.max()))
            raise InputError(
                f"{checkpoint.path}: a prompt has the token {token!r}, but the model's embedding has {rows} rows",
                "a prompt without this token",
            )
        return generate(input_ids=input_ids, **arguments)

    return generate_known


def describe_requests(checkpoint: Checkpoint, ends: EndTokens) -> dict[str, Any]:
    """Return the parameters with which vLLM asks as the provider `hf` does, and stops where it does.

    By itself, vLLM stops at the end tokens of the tokenizer and of generation_config.json alone, and takes for granted
    that a chat template writes the special tokens.
    """
    template = checkpoint.chat_template
    starts = {"add_special_tokens": True} if template is None else {}
    variables = {_VARIABLES: {_THINKING: None}} if _THINKING in (template or "") else {}
    return {"stop_token_ids": list(ends.ids), **starts, **variables}


def begin_answers(model: Any, spec: EvaluationSpec, task: TaskSpec) -> None:
    """Let every answer of a model to a task begin with the task's prefix, if it has one: the model continues from it.

    The prefix follows the prompt as text, and both are tokenized as one. Answers are without it.
    """
    if spec.backend == "vllm":
        body = dict(model.config.extra_body or {})
        variables = {**body.pop(_VARIABLES, {}), PREFIX_VARIABLE: task.assistant_prefix}
        if kept := {key: value for key, value in variables.items() if value or key != PREFIX_VARIABLE}:
            body[_VARIABLES] = kept
        model.config = model.config.model_copy(update={"extra_body": body or None})
        return
    ask = type(model.api).hf_chat

    def ask_to_continue(messages: Any, tools: Any) -> str:
        return f"{ask(model.api, messages, tools)}{task.assistant_prefix or ''}"

    model.api.hf_chat = ask_to_continue


def read_end_tokens(checkpoint: Checkpoint) -> EndTokens:
    """Return the tokens that end an answer of a model that a server loads."""
    from transformers import AutoTokenizer

    return find_end_tokens(AutoTokenizer.from_pretrained(checkpoint.path), checkpoint.path, checkpoint.chat_template)
