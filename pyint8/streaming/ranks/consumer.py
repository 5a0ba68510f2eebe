"""A GPU's consumer whose bytes all ranks gather: it is given what has been gathered, not ranges of files.

Requests are cut into pieces no larger than a band. Each passes through the part of scratch in which the consumer
would let bands land itself, so that no more memory is needed than for one rank alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.extension import _core
from pyint8.streaming.ranks.conductor import Conductor
from pyint8.streaming.ranks.pieces import Piece, own_ranges, part_of
from pyint8.streaming.requests import KERNEL_DTYPES
from pyint8.streaming.scratch import PARTS, Region, ScratchRing, band_bytes

if TYPE_CHECKING:
    from pyint8.streaming.lane import Lane

# That may be on their way, with what one of them takes beyond its share.
_BATCHES = 4
# Pieces asked for at once.
_MOST_AT_ONCE = 64
_SCALE_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Band:
    """A part of a request, as a request of its own.

    Attributes:
        nbytes: To be read; 0 for what has landed, or will without this.
        request: As the extension takes it, where they are in the file.
    """

    nbytes: int
    request: _core.RequestTuple


def bands_of(request: _core.RequestTuple, most: int) -> Iterator[Band]:
    """A request in bands of at most `most` bytes, of a row at least; whole if stored transposed, or landed."""
    (has_landed, file, offset, _), dtype, rows, columns, to, marks = request
    if has_landed:
        yield Band(0, request)
        return
    is_as_stored = not dtype
    if is_as_stored:  # one row of bytes
        rows, columns = columns, 1
    row_bytes = columns * (1 if is_as_stored else KERNEL_DTYPES[dtype].itemsize)
    step = rows if len(to) == 4 and to[1] else max(1, most // row_bytes)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        source = (False, file, offset + row * row_bytes, _core.UNCHECKED)
        height, width = (1, count) if is_as_stored else (count, columns)
        yield Band(count * row_bytes, (source, dtype, height, width, *_moved(to, marks, row, columns)))


def _moved(
    to: _core.Int8Tuple | _core.ValuesTuple, marks: int, row: int, columns: int
) -> tuple[_core.Int8Tuple | _core.ValuesTuple, int]:
    """Where a band's results go that begins at `row`, and its marks."""
    if len(to) == 2:
        dtype, values = to
        return (dtype, values + row * columns * (KERNEL_DTYPES[dtype].itemsize if dtype else 1)), marks
    through_bfloat16, transposed, codes, scales = to
    moved = (through_bfloat16, transposed, codes + row * columns, scales + row * _SCALE_BYTES)
    return moved, marks + row if marks else 0


class SharedConsumer:
    """Has the methods of `_core.Consumer`, and is what the conductor takes pieces from.

    Args:
        consumer: What makes tensors of bytes that have landed.
        conductor: Gathers them.
        engine: Reads this rank's part of them.
        lane: The GPU's.
        scratch: The consumer's, uint8: all but the last of its parts are used here.
    """

    def __init__(
        self, consumer: _core.Consumer, conductor: Conductor, engine: _core.Engine, lane: Lane, scratch: torch.Tensor
    ) -> None:
        self._consumer = consumer
        self._conductor = conductor
        self._engine = engine
        self._lane = lane
        self._band_bytes = band_bytes(scratch.numel())
        self._ring = ScratchRing((PARTS - 1) * self._band_bytes)
        self.scratch = scratch
        self.batch_bytes = self._ring.size // _BATCHES
        self._waiting: deque[Band] = deque()
        self._ends: list[int] = []  # of each request: how many bands there are of it and of all before
        self._given = 0  # bands, to the consumer
        self._placed: deque[tuple[int, Region | None]] = deque()  # what each band passes through, while it does
        # For one weight at a time that must be whole and does not fit in scratch.
        self._large = torch.empty(0, dtype=torch.uint8, device=lane.device)
        self._large_is_used = False

    # --- as a consumer -----------------------------------------------------------------------------------------------

    def submit(self, requests: list[_core.RequestTuple], stream: int) -> int:
        """As the consumer's, for which `stream` is the lane's."""
        first = len(self._ends)
        bands = [list(bands_of(request, self._band_bytes)) for request in requests]

        def add() -> None:
            for of_request in bands:
                self._ends.append((self._ends[-1] if self._ends else 0) + len(of_request))
                self._waiting.extend(of_request)

        self._conductor.notify(add)
        return first

    def wait(self, ticket: int, stream: int) -> int:
        """As the consumer's."""
        self._conductor.wait_for(lambda: self._ends[ticket] <= self._given)
        return bisect_right(self._ends, self._consumer.wait(self._ends[ticket] - 1, stream))

    def done(self) -> int:
        """As the consumer's."""
        return bisect_right(self._ends, self._consumer.done())

    # --- as a source of pieces, on the conductor's thread ------------------------------------------------------------

    def has_more(self) -> bool:
        return bool(self._waiting)

    def sizes_ahead(self) -> Iterator[int]:
        ranks = self._conductor.group.size
        return (band.nbytes for band in self._waiting if part_of(band.nbytes, ranks))

    def feed(self) -> None:
        done = self._consumer.done()
        if self._placed and self._placed[0][0] < done:
            self._reclaim(done - 1)
        placed: list[tuple[Band, Region | None, torch.Tensor | None]] = []
        for band in list(islice(self._waiting, _MOST_AT_ONCE)):
            room = self._room(band.nbytes)
            if room is None and band.nbytes:
                break
            placed.append((band, *(room or (None, None))))
        if placed:
            self._place(placed)

    def await_room(self) -> None:
        if self._placed:
            self._reclaim(self._placed[0][0])

    def _reclaim(self, ticket: int) -> None:
        """Once a band is used up, what is read into its room from now on comes after that on the device."""
        used_up = self._consumer.wait(ticket, self._conductor.group.room_stream)
        while self._placed and self._placed[0][0] < used_up:
            _, region = self._placed.popleft()
            if region is None:
                self._large_is_used = False
            else:
                self._ring.release(region)

    def _room(self, nbytes: int) -> tuple[Region | None, torch.Tensor] | None:
        if 0 < nbytes <= self._ring.size:
            region = self._ring.acquire(nbytes)
            return None if region is None else (region, self.scratch[region.start : region.start + nbytes])
        if not nbytes or self._large_is_used:
            return None
        if self._large.numel() < nbytes:
            self._large = torch.empty(nbytes, dtype=torch.uint8, device=self._lane.device)
        self._large_is_used = True
        return None, self._large[:nbytes]

    def _place(self, placed: Sequence[tuple[Band, Region | None, torch.Tensor | None]]) -> None:
        """Asks for bands' bytes, tells the consumer where they will be, and has them gathered."""
        group = self._conductor.group
        reads: list[tuple[int, int, int, int]] = []
        ends: list[int] = []  # of each piece: how many reads there are of it and of all before
        requests: list[_core.RequestTuple] = []
        promised = self._engine.promise(self._lane.index, len(placed))
        for ticket, (band, _, memory) in enumerate(placed, promised):
            if memory is None:
                requests.append(band.request)
            else:
                (_, file, offset, _), stored, rows, columns, to, marks = band.request
                address = memory.data_ptr()
                for begin, end in own_ranges(band.nbytes, group.rank, group.size):
                    reads.append((file, offset + begin, end - begin, address + begin))
                requests.append(((True, ticket, address, 0), stored, rows, columns, to, marks))
            ends.append(len(reads))
        first = self._engine.submit(self._lane.index, reads, group.room_stream, first=False) if reads else 0
        self._consumer.submit(requests, self._lane.stream)
        pieces: list[Piece] = []
        begin = 0
        for number, ((band, region, memory), end) in enumerate(zip(placed, ends, strict=True)):
            if memory is not None:
                part, whole = part_of(band.nbytes, group.size), range(promised + number, promised + number + 1)
                pieces.append(Piece(memory, part, range(first + begin, first + end), whole))
                self._placed.append((self._given + number, region))
            begin = end
        self._conductor.put(*pieces)
        self._conductor.notify(lambda: self._note_given(len(placed)))

    def _note_given(self, count: int) -> None:
        self._given += count
        for _ in range(count):
            self._waiting.popleft()
