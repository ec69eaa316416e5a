"""Base models on disk: tensors, shapes and sizes from their headers. Only `tensors` needs torch."""
