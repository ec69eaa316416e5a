"""Inspect's cache of answers: off for models whose weights are in the job, whatever a task asks for.

The cache knows a model by its name (inspect_ai/model/_cache.py), and names repeat: a point keeps its name when it is
trained again, and every experiment has a baseline. It would give one model's answers under another model's name.
"""

from inspect import signature
from typing import Any

from inspect_ai.model import Model


class _UncachedModel(Model):  # type: ignore[misc]
    """A class, since Inspect copies a role's model that is asked for with a configuration."""

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        call = signature(Model.generate).bind(self, *arguments, **named)
        call.arguments["cache"] = False
        return await Model.generate(*call.args, **call.kwargs)


def switch_off_cache(model: Any) -> None:
    """Have an Inspect model answer every request itself."""
    model.__class__ = _UncachedModel
