"""Format numbers for people: bytes, counts, seconds."""


def format_bytes(size: float) -> str:
    """Return a size with a decimal unit (1 kB = 1000 B) that fits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB" if size < 1000 else f"{size:,.0f} TB"


def format_count(number: int) -> str:
    """Return a number as text; from 1000 on, in thousands (K), millions (M) or billions (G)."""
    return format_bytes(number).rstrip("B").rstrip().replace("k", "K") if number >= 1000 else str(number)


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


GB = 1e9
