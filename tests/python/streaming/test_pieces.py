"""What is gathered at once, and who reads which of its bytes."""

from __future__ import annotations

import pytest

from pyint8 import _core
from pyint8.errors import OptionError
from pyint8.streaming.ranks import pieces


@pytest.fixture(autouse=True)
def small_pieces_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_BYTES", 4096)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 5000, 123_457])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_parts_cover_a_piece_once(nbytes: int, size: int) -> None:
    part = pieces.part_of(nbytes, size)
    assert (part == 0) == (nbytes < 4096)
    covered = [byte for rank in range(size) for byte in range(rank * part, (rank + 1) * part)]
    for rank in range(size):
        spans = pieces.share_of(rank, size).spans_of(nbytes)
        mine = [byte for begin, end, _ in spans for byte in range(begin, end)]
        assert [is_part for *_, is_part in spans if is_part] == [True] * bool(part)
        assert mine == sorted(set(mine))
        assert set(mine) <= set(range(nbytes))
        assert len(mine) < nbytes / size + 16 * size if part else len(mine) == nbytes
        covered += [byte for byte in mine if byte >= size * part and rank == 0]
    assert sorted(covered) == list(range(nbytes))


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (0, 0)])
def test_there_is_no_such_rank(rank: int, ranks: int) -> None:
    with pytest.raises(OptionError, match=f"no rank {rank} among {ranks}"):
        _core.Share(rank, ranks, 0)
