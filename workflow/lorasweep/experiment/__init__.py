"""The experiment file: its sections, points, tasks and training data."""
