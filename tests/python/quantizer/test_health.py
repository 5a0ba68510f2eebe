"""Marks that were set on a device: whose they are, wherever in their storage they lie."""

from __future__ import annotations

import pytest
import torch

from pyint8.quantizer import BadWeight, WeightHealth


@pytest.mark.parametrize(
    ("ranges", "bad"),
    [
        ({"a": (20, 50), "b": (50, 60)}, [BadWeight("b", 7)]),
        ({"a": (0, 20), "b": (80, 100)}, [BadWeight("a", 3), BadWeight("b", 10)]),
        ({"a": (60, 70)}, []),
        ({"b": (90, 91), "a": (56, 58)}, [BadWeight("b", 0), BadWeight("a", 1)]),
    ],
)
def test_marks_of_one_storage(ranges: dict[str, tuple[int, int]], bad: list[BadWeight]) -> None:
    marks = torch.zeros(100, dtype=torch.uint8)
    marks[[3, 57, 90]] = 1
    health = WeightHealth()
    for name, (start, end) in ranges.items():
        health.watch_marks(name, marks[start:end])
    assert health.bad_weights() == bad


def test_parts_are_named_once_each_with_their_first_bad_row() -> None:
    health = WeightHealth()
    marks = torch.zeros(100, dtype=torch.uint8)
    marks[[3, 9, 10, 39, 40, 99]] = 1
    health.watch_marks("whole", marks, parts=lambda: [(0, "a"), (10, "b"), (40, "c"), (60, "d"), (99, "e")])
    assert health.bad_weights() == [BadWeight("a", 3), BadWeight("b", 0), BadWeight("c", 0), BadWeight("e", 0)]


def test_all_that_overflowed_is_named() -> None:
    health = WeightHealth()
    health.watch_marks("whole", torch.ones(1, dtype=torch.uint8), lambda: [BadWeight("a", 3), BadWeight("c", 5)])
    health.watch_marks("good", torch.zeros(1, dtype=torch.uint8), lambda: [BadWeight("never", 0)])
    assert health.bad_weights() == [BadWeight("a", 3), BadWeight("c", 5)]
