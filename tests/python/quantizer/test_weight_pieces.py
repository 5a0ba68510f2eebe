"""How many rows are given to bitsandbytes at once."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant

from pyint8.quantizer import codes_of, weights


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [((3, 1 << 30), [1, 1, 1]), ((5, 1 << 29), [3, 2]), ((4, 1 << 29), [3, 1]), ((3, 1 << 29), [3]), ((0, 5), [0])],
    ids=str,
)
def test_no_more_elements_than_its_kernel_counts(shape: tuple[int, int], pieces: list[int]) -> None:
    """In 32 bits: of more it would write elsewhere."""
    found = list(weights._pieces(7, torch.empty(shape, dtype=torch.float16, device="meta")))
    assert [len(rows) for _, rows in found] == pieces
    assert [first for first, _ in found] == [7 + sum(pieces[:number]) for number in range(len(pieces))]


@pytest.mark.parametrize("rows", [1, 100, 1500])
def test_codes_of_a_whole_weight(rows: int) -> None:
    weight = torch.randn(rows, 1000, dtype=torch.bfloat16)
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    found = codes_of(weight)
    assert torch.equal(found[0], codes)
    assert torch.equal(found[1], scales)
