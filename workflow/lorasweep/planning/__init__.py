"""What a sweep will take, before it is spent: bytes, hours, GPU hours."""
