"""Bookkeeping of a fixed buffer whose regions are released in roughly the order they were acquired."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

# Of every region's start and size: as torch's allocator aligns, and enough for a GPU's widest loads.
ALIGNMENT = 256
# Of the scratch of a GPU's consumer whose bands all ranks gather, which are the smaller ones
# (csrc/core/quantize/consumer.cpp): a band fits in each, and the last holds the fp16 form of one.
SHARED_PARTS = 12


def shared_band_bytes(scratch_bytes: int) -> int:
    """What a part of such a consumer's scratch holds."""
    return scratch_bytes // SHARED_PARTS // ALIGNMENT * ALIGNMENT


@dataclass(slots=True)
class Region:
    """A range of the buffer, in bytes. `end` includes the padding."""

    start: int
    nbytes: int
    end: int
    free: bool = False


class ScratchRing:
    """Hands out regions of `size` bytes in a circle; a region can be used again once all older ones are released."""

    def __init__(self, size: int) -> None:
        self.size = size // ALIGNMENT * ALIGNMENT
        self._regions: deque[Region] = deque()
        self._next = 0

    def acquire(self, nbytes: int) -> Region | None:
        """A region of `nbytes`, or None while there is no space for it."""
        need = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        start = self._fit(need)
        if start is None:
            return None
        region = Region(start, nbytes, start + need)
        self._regions.append(region)
        self._next = region.end
        return region

    def release(self, region: Region) -> None:
        """Gives a region back, in any order."""
        region.free = True
        while self._regions and self._regions[0].free:
            self._regions.popleft()
        if not self._regions:
            self._next = 0

    def _fit(self, need: int) -> int | None:
        if not self._regions:
            return 0 if need <= self.size else None
        oldest = self._regions[0].start
        # The newest region ends at _next. The space after it is free, up to the oldest region or the end of the buffer.
        wrapped = self._next <= oldest
        if wrapped:
            return self._next if oldest - self._next >= need else None
        if self.size - self._next >= need:
            return self._next
        return 0 if oldest >= need else None
