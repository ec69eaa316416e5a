"""Files as others may read them."""

import os
from pathlib import Path


def give_default_mode(file: Path) -> None:
    """Give a file the permissions that the umask leaves to new ones: safetensors' are their owner's alone."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    file.chmod(0o666 & ~mask)
