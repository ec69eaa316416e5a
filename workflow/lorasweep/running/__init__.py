"""A run of a sweep: its process, its jobs, its accounts, its status and its summary."""
