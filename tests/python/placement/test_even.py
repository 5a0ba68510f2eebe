"""Where an even map is likely to put parts, by their sizes alone; tests/contract/test_even_maps asks transformers."""

from __future__ import annotations

import pytest

from pyint8.placement.even import even_needs, even_parts


@pytest.mark.parametrize(
    ("sizes", "gpus", "counts"),
    [
        ([], 2, [0, 0]),
        ([5, 5, 5], 1, [3]),
        # 0.9 * (80 / 2 + 12.5) = 47.25 each; the first keeps 10 of them free.
        ([10] * 8, 2, [3, 5]),
        # 0.9 * (80 / 4 + 12.5) = 29.25: two each, one on the first; the last takes what is left.
        ([10] * 8, 4, [1, 2, 2, 3]),
        # 0.9 * (104 / 2 + 125) = 159.3, of which the first keeps 100 free, until these have come.
        ([1, 1, 100, 1, 1], 2, [5, 0]),
        # 0.9 * (260 / 2 + 125) = 229.5, so no room for the 70 while the 100 are still to come.
        ([30, 30, 30, 70, 100], 2, [3, 2]),
        # The last two get none: 0.9 * (20 / 4 + 12.5) = 15.75.
        ([10, 10], 4, [0, 1, 1, 0]),
    ],
)
def test_parts(sizes: list[int], gpus: int, counts: list[int]) -> None:
    parts = even_parts(sizes, gpus)
    assert [len(part) for part in parts] == counts
    assert [index for part in parts for index in part] == list(range(len(sizes)))


def test_needs() -> None:
    # 80 / 4 + 12.5 each; the last one holds three of the parts, in 0.9 of what it has.
    assert even_needs([10] * 8, 4) == [32, 32, 32, 33]
    assert even_needs([], 2) == [0, 0]
