"""A run: who holds it, what is heard of its jobs, what it leaves, how far it is."""
