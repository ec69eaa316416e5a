"""LoRA adapters on disk: reading, taking over, merging."""
