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
