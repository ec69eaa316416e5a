"""Base models on disk, by their headers: tensors, shapes, sizes; without torch, but for `tensors`."""
