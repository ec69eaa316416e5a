"""Format numbers for people: bytes, counts, seconds, scores."""

GB = 1e9

_UNITS = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": GB, "TB": 1e12}


def get_unit(size: float) -> tuple[str, float]:
    """Return the decimal unit (1 kB = 1000 B) that fits a size, and its bytes. The size is 1 or more of it."""
    return next((unit for unit in reversed(_UNITS.items()) if abs(size) >= 0.9995 * unit[1]), ("B", 1.0))


def format_bytes(size: float) -> str:
    """Return a size with the unit that fits it."""
    unit, each = get_unit(size)
    digits = ".0f" if unit == "B" or size >= 999.5 * each else ".3g"
    return f"{size / each:,{digits}} {unit}"


def format_count(number: int) -> str:
    """Return a number as text; from 1000 on, in thousands (K), millions (M) or billions (G)."""
    return format_bytes(number).rstrip("B").rstrip().replace("k", "K") if number >= 1000 else str(number)


def format_seconds(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, whichever fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def format_score(score: float, sign: str = "") -> str:
    """Return a score with three decimals, or from 100 on with one; with the sign `+` if positive, if `sign` is that."""
    return f"{score:{sign},.{3 if abs(score) < 100 else 1}f}"
