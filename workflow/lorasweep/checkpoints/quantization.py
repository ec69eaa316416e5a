"""How a base model is quantized in memory, the same in training and in evaluation."""

from typing import Any

from lorasweep.checkpoints.tensors import get_torch_name


def make_quantization(kind: str, dtype: str) -> Any:
    """Return transformers' configuration for `model.quantize`: `nf4` or `int8`, with computations in `dtype`.

    `nf4` is QLoRA's (Dettmers et al. 2023, arXiv:2305.14314): 4-bit NormalFloat with double quantization.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=get_torch_name(dtype),
    )
