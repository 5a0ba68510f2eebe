"""What is gathered at once, and who reads which of its bytes."""

from __future__ import annotations

from typing import Any

import pytest

from pyint8 import _core
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.consumer import bands_of


@pytest.fixture(autouse=True)
def small_pieces_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 4096)


@pytest.mark.parametrize(
    "request_tuple",
    [
        ((False, 3, 1000, 5), "BF16", 10, 4, (True, False, 5000, 6000), 7000),
        ((False, 3, 1000, 5), "BF16", 10, 4, (True, False, 5000, 6000), 0),
        ((False, 3, 1000, 5), "F32", 40, 1, ("F16", 5000), 7000),
        ((False, 3, 1000, 5), "", 1, 77, ("", 5000), 0),
    ],
    ids=str,
)
def test_bands_of_a_request(request_tuple: Any) -> None:
    (_, file, offset, _), dtype, rows, columns, to, marks = request_tuple
    bands = list(bands_of(request_tuple, 16))
    itemsize = {"BF16": 2, "F32": 4, "": 1}[dtype]
    assert sum(band.nbytes for band in bands) == rows * columns * itemsize
    assert all(0 < band.nbytes <= 16 for band in bands)
    at = 0
    for band in bands:
        (_, of_file, start, checksum), kind, height, width, where, at_marks = band.request
        assert (of_file, start, kind) == (file, offset + at, dtype)
        assert height * width * itemsize == band.nbytes
        assert checksum == _core.UNCHECKED
        elements = at // itemsize
        if len(to) == 4:
            row = elements // columns
            assert where == (True, False, 5000 + elements, 6000 + 4 * row)
            assert at_marks == (marks + row if marks else 0)
        else:
            assert where == (to[0], 5000 + elements * (2 if dtype else 1))
            assert at_marks == marks
        at += band.nbytes


def test_what_is_transposed_or_has_landed_is_whole() -> None:
    transposed: Any = ((False, 0, 0, _core.UNCHECKED), "F16", 100, 100, (False, True, 1, 2), 3)
    landed: Any = ((True, 0, 0, 0), "F16", 100, 100, (False, False, 1, 2), 3)
    assert [(band.nbytes, band.request) for band in bands_of(transposed, 16)] == [(20_000, transposed)]
    assert [(band.nbytes, band.request) for band in bands_of(landed, 16)] == [(0, landed)]


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 5000, 123_457])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_parts_cover_a_piece_once(nbytes: int, size: int) -> None:
    part = pieces.part_of(nbytes, size)
    assert (part == 0) == (nbytes < 4096)
    covered = [byte for rank in range(size) for byte in range(rank * part, (rank + 1) * part)]
    for rank in range(size):
        mine = [byte for begin, end in pieces.own_ranges(nbytes, rank, size) for byte in range(begin, end)]
        assert mine == sorted(set(mine))
        assert set(mine) <= set(range(nbytes))
        assert len(mine) < nbytes / size + 16 * size if part else len(mine) == nbytes
        covered += [byte for byte in mine if byte >= size * part and rank == 0]
    assert sorted(covered) == list(range(nbytes))
