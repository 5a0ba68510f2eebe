"""The scratch ring's arithmetic, against what it must never do."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyint8.streaming.scratch import ALIGNMENT, Region, ScratchRing

SIZE = 16 * ALIGNMENT
# None releases the oldest region, an integer k the k-th of those live, a list [n] asks for n bytes.
STEPS = st.lists(
    st.one_of(st.none(), st.integers(0, 7), st.lists(st.integers(0, SIZE + 1), min_size=1, max_size=1)), max_size=60
)


def rounded(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT


@given(STEPS)
def test_live_regions_are_apart_aligned_and_inside(steps: list[int | list[int] | None]) -> None:
    ring = ScratchRing(SIZE)
    live: list[Region] = []
    for step in steps:
        if isinstance(step, list):
            region = ring.acquire(step[0])
            if region is not None:
                live.append(region)
            else:
                assert live or step[0] > SIZE, "an empty ring refused what fits"
        elif live:
            ring.release(live.pop(0 if step is None else step % len(live)))
        spans = sorted((region.start, region.start + max(1, region.nbytes)) for region in live)
        assert all(start % ALIGNMENT == 0 and 0 <= start < end <= SIZE for start, end in spans)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    for region in live:
        ring.release(region)
    assert ring.acquire(SIZE) is not None, "all was released, and all cannot be had"


@given(st.lists(st.integers(1, SIZE // 2), min_size=1, max_size=40))
def test_what_passes_through_in_order_never_gets_stuck(sizes: list[int]) -> None:
    """Two regions of half the buffer at most: one of them released always makes room for the next."""
    ring = ScratchRing(SIZE)
    before: Region | None = None
    for size in sizes:
        region = ring.acquire(size)
        if region is None:
            assert before is not None
            ring.release(before)
            before = None
            region = ring.acquire(size)
        elif before is not None:
            ring.release(before)
        assert region is not None
        before = region


@given(st.integers(0, SIZE), st.integers(0, SIZE))
def test_two_regions_fit_exactly_when_their_sum_does(first: int, second: int) -> None:
    ring = ScratchRing(SIZE)
    assert ring.acquire(first) is not None
    assert (ring.acquire(second) is not None) == (rounded(first) + rounded(second) <= SIZE)


def test_a_region_is_used_again_once_all_older_ones_are_released() -> None:
    ring = ScratchRing(4 * ALIGNMENT)
    first, second, third = (ring.acquire(ALIGNMENT) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    ring.release(second)
    assert ring.acquire(2 * ALIGNMENT) is None, "the oldest is live, and only one block is left behind the newest"
    ring.release(first)
    again = ring.acquire(2 * ALIGNMENT)
    assert again is not None
    assert (again.start, again.nbytes) == (0, 2 * ALIGNMENT)
    assert third.start == 2 * ALIGNMENT


@pytest.mark.parametrize(("size", "usable"), [(0, 0), (ALIGNMENT - 1, 0), (ALIGNMENT, 1), (3 * ALIGNMENT + 7, 3)])
def test_only_whole_blocks_of_the_buffer_are_used(size: int, usable: int) -> None:
    ring = ScratchRing(size)
    assert ring.size == usable * ALIGNMENT
    assert sum(ring.acquire(1) is not None for _ in range(5)) == usable
