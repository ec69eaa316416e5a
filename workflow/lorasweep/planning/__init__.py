"""Plan the cost of a sweep before it runs: bytes, hours, GPU hours."""
