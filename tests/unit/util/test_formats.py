"""A number for people has the unit that fits it, and is never nothing unless it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasweep.util.formats import format_bytes, format_count, format_score, get_unit


@given(st.integers(1, 10**18))
def test_a_size_is_never_shown_as_nothing_nor_off_by_more_than_its_digits(size: int) -> None:
    number, unit = format_bytes(size).split()
    shown = float(number.replace(",", ""))
    each = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert get_unit(size) == (unit, each)
    assert shown >= 1
    assert shown < 1000 or unit == "TB"
    assert shown * each == pytest.approx(size, rel=0.005)


@pytest.mark.parametrize(
    ("size", "shown"),
    [(0, "0 B"), (512, "512 B"), (27_262_976, "27.3 MB"), (999_600_000, "1 GB"), (2.5e15, "2,500 TB")],
)
def test_a_size_has_the_unit_that_fits(size: float, shown: str) -> None:
    assert format_bytes(size) == shown


def test_counts_and_scores() -> None:
    assert [format_count(n) for n in (12, 1500, 8_030_000_000)] == ["12", "1.5 K", "8.03 G"]
    assert [format_score(s) for s in (0.22, -0.5, 12.3456, 1234.56)] == ["0.220", "-0.500", "12.346", "1,234.6"]
    assert [format_score(s, "+") for s in (0.22, -0.5)] == ["+0.220", "-0.500"]
