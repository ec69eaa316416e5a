"""Data types of weights: their names in safetensors, torch and the experiment file, and their sizes."""

BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "C64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Size of a value in bits, by safetensors' name of the type."""

TORCH_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Safetensors' names of types, by torch's names, which a model's configuration uses."""

PRECISIONS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Safetensors' names of the precisions of a model, by their names in the experiment file."""

BYTES = {precision: BITS[dtype] // 8 for precision, dtype in PRECISIONS.items()}
"""Size of a value in bytes, by precision."""
