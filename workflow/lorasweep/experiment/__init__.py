"""The experiment file: its sections, the points that it makes, its tasks and training data."""
