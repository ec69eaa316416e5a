"""A job ends in order when it is told to, however often it is told."""

import os
import signal
from collections.abc import Iterator

import pytest

from lorasweep.util.process import noticing_sigterm


@pytest.fixture(autouse=True)
def told_else() -> Iterator[list[int]]:
    """Return where SIGTERM is noted outside of blocks."""
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    yield told
    signal.signal(signal.SIGTERM, before)


def end() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_block_that_was_told_to_end_is_not_told_again_on_its_way_out(told_else: list[int]) -> None:
    told: list[str] = []

    def work() -> None:
        with noticing_sigterm(lambda: told.append("inside")):
            end()
            end()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    end()
    assert told == ["inside", "inside"]
    assert told_else == []


@pytest.mark.parametrize("is_told", [True, False])
def test_after_a_block_that_ended_well_the_signal_means_what_it_meant(is_told: bool, told_else: list[int]) -> None:
    with noticing_sigterm(lambda: None):
        if is_told:
            end()
    end()
    assert told_else == [signal.SIGTERM]


def test_after_a_block_that_failed_untold_the_signal_means_what_it_meant(told_else: list[int]) -> None:
    with pytest.raises(ZeroDivisionError), noticing_sigterm(lambda: None):
        raise ZeroDivisionError
    end()
    assert told_else == [signal.SIGTERM]
