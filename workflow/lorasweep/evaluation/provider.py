"""The entry point by which Inspect finds the model provider `lorasweep`: see lorasweep.adapted_model."""

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="lorasweep")  # type: ignore[untyped-decorator]
def lorasweep() -> type[Any]:
    """Models that are a base model and a LoRA adapter in memory; torch is imported when one is asked for."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        from inspect_ai._util.error import pip_dependency_error

        raise pip_dependency_error("lorasweep", ["torch", "transformers", "peft", "accelerate"]) from error
    from lorasweep.evaluation.adapted_model import AdaptedModelAPI

    return AdaptedModelAPI
