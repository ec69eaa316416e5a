"""The models of Inspect's roles in a job, such as the grader of a model-graded task: each is loaded once."""

from pathlib import Path
from typing import Any

from lorasweep.checkpoints.chat_template import read_kept_template
from lorasweep.checkpoints.checkpoint import Checkpoint, read_checkpoint
from lorasweep.evaluation.prompts import get_replacement, prepare
from lorasweep.evaluation.spec import EvaluationSpec, RoleSpec, fingerprint_role
from lorasweep.experiment.roles import get_folders
from lorasweep.util.errors import InputError

_OPENED: dict[tuple[str, str], Any] = {}
"""Models of this process, by role and place."""


def open_roles(spec: EvaluationSpec) -> dict[str, Any]:
    """Return Inspect's model of each role. A model is loaded on the first call in a process, and kept.

    To be called before the evaluated model is made: loading a model sets the seed of all random numbers.

    Raises:
        InputError: a model has changed since the run began.
    """
    return {name: _open(spec, name, role) for name, role in (spec.model_roles or {}).items()}


def _open(spec: EvaluationSpec, name: str, role: RoleSpec) -> Any:
    from inspect_ai.model import GenerateConfig, ModelInfo, get_model, set_model_info

    import lorasweep.evaluation.provider  # noqa: F401  registers the provider, even if this package is not installed
    from lorasweep.evaluation.answer_cache import switch_off_cache

    key = (role.model_dump_json(), spec.placement)
    if key not in _OPENED:
        config, arguments = dict(role.config), dict(role.args)
        if role.fingerprint:
            if role.fingerprint != fingerprint_role(role):
                raise InputError(f"model role '{name}': {role.model} has changed since this run began")
            _fill_in(spec, role, config, arguments)
        model = get_model(
            role.model, config=GenerateConfig(**config), base_url=role.base_url, memoize=False, **arguments
        )
        if role.fingerprint:
            switch_off_cache(model)
            if not hasattr(model.api, "base"):
                prepare(model.api, _read(role))
            # Inspect loads a model of an unknown context length a second time, by its name, to ask for that.
            set_model_info(str(model), ModelInfo(context_length=_read(role).config.get("max_position_embeddings")))
        _OPENED[key] = model
    return _OPENED[key]


def _fill_in(spec: EvaluationSpec, role: RoleSpec, config: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Add what makes a local model answer as the evaluated models do: on their devices, greedily, in batches."""
    sampled = bool(config.get("temperature"))
    if not sampled:  # transformers wants do_sample with a temperature, or neither
        config.pop("temperature", None)
    config.setdefault("seed", spec.seed)
    config.setdefault("max_connections", spec.max_connections)
    arguments.setdefault("device", spec.placement)
    arguments.setdefault("do_sample", sampled)
    if template := get_replacement(_read(role), spec.template_date):
        arguments.setdefault("chat_template", template)
    # A chat template writes the special tokens; the tokenizer would add a second one in front.
    arguments.setdefault("tokenizer_call_args", {"add_special_tokens": not _read(role).has_chat_template})


def _read(role: RoleSpec) -> Checkpoint:
    folder, adapter = get_folders(role.model, role.args)
    return read_checkpoint(Path(str(folder)), read_kept_template(Path(adapter)) if adapter else None)
