"""What a rank still has to do with the others, in the order that is the same on all of them: pieces and meetings.

Without a lock of its own: its only user, the conductor, has one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch

from pyint8.streaming.ranks.meetings import Meeting, Source
from pyint8.streaming.ranks.pieces import Piece, in_batches, part_of
from pyint8.streaming.scratch import ALIGNMENT

# That are agreed on in one round: they are gathered before a failure is told, or a meeting is held that need not wait.
# So they are no more, but for the last of them, than take so long at the speed of the round before.
MOST_PIECES = 32
_ROUND_SECONDS = 0.03
_LEAST_BYTES, _FIRST_BYTES, _MOST_BYTES = 128 << 20, 512 << 20, 1 << 30


class Agenda:
    """Pieces and meetings that were put in, and what a source has.

    Args:
        ranks: How many there are.

    Attributes:
        source: Has what is gathered behind all pieces; None if there is none, or it is over.
        batch_bytes: Of a source's bands that are gathered at once, but for the last of them.
        agreed: Sizes of the next pieces that all ranks will gather, in batches.
        has_dropped: Whether the pieces in it will not come.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._items: deque[Piece | Meeting] = deque()
        self._meetings: deque[Meeting] = deque()  # those of them
        self._spare: torch.Tensor | None = None
        self._most_bytes = _FIRST_BYTES
        self.source: Source | None = None
        self.batch_bytes = 0
        self.agreed: deque[list[int]] = deque()
        self.has_dropped = False

    @property
    def head(self) -> Piece | Meeting | None:
        return self._items[0] if self._items else None

    @property
    def source_has_more(self) -> bool:
        return self.source is not None and self.source.has_more()

    @property
    def is_empty(self) -> bool:
        return not (self._items or self.agreed or self.source_has_more)

    def put(self, items: Sequence[Piece | Meeting]) -> None:
        self._items.extend(items)
        self._meetings.extend(item for item in items if isinstance(item, Meeting))

    def attach(self, source: Source | None, *, is_open: bool) -> None:
        """Takes another source; without an engine that `is_open`, what was agreed on is still to be gathered."""
        self.source = source
        if is_open:
            self.batch_bytes = 0 if source is None else source.batch_bytes
        if source is not None or not self.agreed:
            self._spare = None if source is None else source.scratch

    @property
    def agreed_bytes(self) -> int:
        """Of the next pieces that all ranks will gather."""
        return sum(map(sum, self.agreed))

    def note_speed(self, nbytes: int, seconds: float) -> None:
        """So many bytes were gathered in a round."""
        if nbytes:
            in_a_round = int(nbytes / max(seconds, 1e-6) * _ROUND_SECONDS)
            self._most_bytes = min(max(in_a_round, _LEAST_BYTES), _MOST_BYTES)

    def proposal(self) -> list[int] | None:
        """Sizes of the next pieces that could be agreed on; None if there is nothing to gather.

        Nobody has to agree on what all read whole.
        """
        if self.has_dropped and not self.agreed:
            self._items = deque(self._meetings)
            self.has_dropped = False
        agreed = sum(map(len, self.agreed))
        sizes = [] if self.has_dropped else self._sizes_ahead(agreed, MOST_PIECES)
        sizes = next(iter(in_batches(sizes, self._most_bytes)), [])
        return sizes if sizes or agreed or isinstance(self.head, Piece) else None

    def _own_sizes(self) -> Iterator[int]:
        """Of the pieces to be gathered before the next meeting."""
        for item in self._items:
            if isinstance(item, Meeting):
                return
            if item.part:
                yield item.nbytes

    def _sizes_ahead(self, skipped: int, most: int) -> list[int]:
        """Of what is gathered before the next meeting, but for the first `skipped`; `most` at most."""
        own = list(self._own_sizes())
        found = own[skipped : skipped + most]
        if self.source is not None and not self._meetings and len(found) < most:
            found += self.source.sizes_ahead(max(0, skipped - len(own)), most - len(found))
        return found

    def agree(self, sizes: Sequence[int], own_bytes: int, batch_bytes: int) -> None:
        """All ranks will gather pieces of these sizes next.

        Args:
            sizes: In order.
            own_bytes: Of pieces so much is gathered at once, or half of all of them; 0 for one by one.
            batch_bytes: Of a source's bands.
        """
        own = max(0, sum(1 for _ in self._own_sizes()) - sum(map(len, self.agreed)))
        self.agreed.extend(in_batches(sizes[:own], own_bytes and max(own_bytes, sum(sizes[:own]) // 2)))
        self.agreed.extend(in_batches(sizes[own:], batch_bytes))

    def take(self, left: deque[int]) -> Iterator[Piece]:
        """The next pieces, until none is left of those to be gathered, and what is between; a source has the others."""
        while isinstance(head := self.head, Piece) and (left or not head.part):
            self._items.popleft()
            if head.part:
                left.popleft()
            yield head

    @property
    def next_meeting(self) -> Meeting | None:
        """If nothing is to be gathered before it."""
        return head if isinstance(head := self.head, Meeting) else None

    @property
    def urgent(self) -> Meeting | None:
        """The next meeting, if it is held as soon as all ranks have come to it, whatever is to be gathered before."""
        return self._meetings[0] if self._meetings and self._meetings[0].is_urgent else None

    def remove(self, meeting: Meeting) -> None:
        """It was held."""
        self._meetings.remove(meeting)
        self._items.remove(meeting)

    def drop(self) -> None:
        """Pieces will not come. Those that were agreed on are gathered nevertheless, before they are forgotten."""
        self.has_dropped = True
        self.source = None

    def spare_pieces(self, sizes: Iterable[int], device: torch.device | None) -> Iterator[Piece]:
        """In place of pieces that were agreed on, and will not come."""
        begin = 0
        for nbytes in sizes:
            end = begin + nbytes
            if self._spare is not None and end <= self._spare.numel():
                memory = self._spare[begin:end]
                begin = -(-end // ALIGNMENT) * ALIGNMENT
            else:
                memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
            yield Piece(memory, part_of(nbytes, self._ranks), range(0), range(0))

    def clear(self) -> None:
        self._items.clear()
        self._meetings.clear()
        self.agreed.clear()
        self.source = self._spare = None
