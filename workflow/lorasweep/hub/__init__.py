"""What the experiment names on the Hugging Face hub."""
