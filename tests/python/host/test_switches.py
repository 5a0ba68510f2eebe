"""The interval after which threads switch, within and after a block."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from pyint8.host.switches import quick_switches


@pytest.fixture(autouse=True)
def usual() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.005)
    yield
    sys.setswitchinterval(before)


def test_it_is_short_within_a_block_and_as_before_after_it() -> None:
    found: list[float] = []

    def fail() -> None:
        with quick_switches():
            found.append(sys.getswitchinterval())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [pytest.approx(2e-5)]
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_blocks_that_overlap_leave_it_as_it_was() -> None:
    first, second = quick_switches(), quick_switches()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(2e-5)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_a_shorter_one_stays() -> None:
    sys.setswitchinterval(1e-5)
    with quick_switches():
        assert sys.getswitchinterval() == pytest.approx(1e-5)
    assert sys.getswitchinterval() == pytest.approx(1e-5)
