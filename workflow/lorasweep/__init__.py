"""lorasweep: sweeps of LoRA fine-tuning, from one experiment file to one table."""
