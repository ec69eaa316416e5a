"""Evaluation with Inspect: what it depends on, its state, its models, the proof that an adapter was applied."""
