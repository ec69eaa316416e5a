"""Models and data on the Hugging Face hub."""
