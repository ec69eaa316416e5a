"""Read, adopt and merge LoRA adapters."""
