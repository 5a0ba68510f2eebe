"""What is gathered at once, and which of its bytes a rank reads: pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.extension import _core

if TYPE_CHECKING:
    from pyint8.streaming.transport import ReadRequest

# All ranks read smaller pieces whole: to gather them would take longer, and between a rank's parts of neighbours
# would be gaps that the engine reads through (csrc/core/transfer/engine.cpp).
_LEAST_BYTES = 256 << 10


def share_of(rank: int, ranks: int) -> _core.Share:
    """What a rank reads of pieces: the extension has the rule, for its own bands as for these."""
    return _core.Share(rank, ranks, _LEAST_BYTES)


def part_of(nbytes: int, ranks: int) -> int:
    """The bytes of a piece that each rank reads; what is behind all parts is read by all. 0: they read it whole."""
    return share_of(0, ranks).part_of(nbytes)


@dataclass(frozen=True)
class Piece:
    """What is gathered at once, while this rank's part of it is on its way.

    Attributes:
        memory: Of all of it, uint8.
        part: The bytes that each rank reads (see `part_of`).
        tickets: The engine's, of what this rank reads.
        promised: The engine's, of the whole: kept once it is gathered.
    """

    memory: torch.Tensor
    part: int
    tickets: range
    promised: range

    @property
    def nbytes(self) -> int:
        return self.memory.numel()


def in_batches(sizes: Iterable[int], most: int) -> list[list[int]]:
    """Sizes of pieces that are gathered by one call each: a batch ends once it has at least `most` bytes."""
    batches: list[list[int]] = []
    left = 0
    for nbytes in sizes:
        if left <= 0:
            batches.append([])
            left = most
        batches[-1].append(nbytes)
        left -= nbytes
    return batches


def together(reads: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Neighbours that land one behind the other in the same memory, from its start: pieces of one chunk."""
    for _, group in groupby(reads, key=lambda read: id(read.memory)):
        yield list(group)


def own_reads(reads: Sequence[ReadRequest], rank: int, ranks: int) -> list[ReadRequest]:
    """What a rank reads of a piece that several reads make."""
    starts = list(accumulate((read.nbytes for read in reads), initial=0))
    found = []
    for begin, end, is_part in share_of(rank, ranks).spans_of(starts[-1]):
        for start, read in zip(starts, reads, strict=False):
            low, high = max(begin, start), min(end, start + read.nbytes)
            if low < high:
                cut = _cut(read, low - start, high - low)
                found.append(replace(cut, checksum=_core.checksum_of_parts(cut.checksum)) if is_part else cut)
    return found


def _cut(read: ReadRequest, start: int, nbytes: int) -> ReadRequest:
    return replace(read, offset=read.offset + start, at=read.at + start, nbytes=nbytes)
