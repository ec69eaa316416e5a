"""The entry point of the model provider `lorasweep` for Inspect: see lorasweep.evaluation.adapted_model."""

from typing import Any

from inspect_ai.model import modelapi


@modelapi(name="lorasweep")  # type: ignore[untyped-decorator]
def lorasweep() -> type[Any]:
    """Return the provider of base models with LoRA adapters in memory. torch is imported only now."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        from inspect_ai._util.error import pip_dependency_error

        raise pip_dependency_error("lorasweep", ["torch", "transformers", "peft", "accelerate"]) from error
    from lorasweep.evaluation.adapted_model import AdaptedModelAPI

    return AdaptedModelAPI
