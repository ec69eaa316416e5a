"""A cgroup with little memory, in which the kernel kills what takes more."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@contextmanager
def limit_memory(size: int) -> Iterator[Path]:
    """Make a cgroup of so many bytes, and remove it when it is empty; a process joins by its id in `cgroup.procs`.

    Raises:
        OSError: none can be made here, for want of root or of a memory controller.
    """
    is_old = (_ROOT / "memory").is_dir()
    group = (_ROOT / "memory" if is_old else _ROOT) / f"lorasweep-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        if is_old:
            limits = {"memory.limit_in_bytes": size, "memory.memsw.limit_in_bytes": size}
        else:
            limits = {"memory.max": size, "memory.swap.max": 0}
        for name, value in limits.items():
            if (group / name).exists() or "sw" not in name:  # a kernel without swap has no limit on it
                (group / name).write_text(str(value))
        yield group
    finally:
        group.rmdir()
