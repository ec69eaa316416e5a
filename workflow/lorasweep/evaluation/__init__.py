"""Evaluation with Inspect: its specification, its state, its models, the proof that an adapter was applied."""
