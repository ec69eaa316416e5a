"""Numbers as people read them: bytes, counts, seconds."""


def format_bytes(size: float) -> str:
    """A size in the unit that fits it, of 1000 each."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def format_count(number: int) -> str:
    """A number in thousands, millions or billions where it is large."""
    return format_bytes(number).rstrip("B").rstrip().replace("k", "K") if number >= 1000 else str(number)


def format_seconds(seconds: float) -> str:
    """A time in the unit that fits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


GB = 1e9
