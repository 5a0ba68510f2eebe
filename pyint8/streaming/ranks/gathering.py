"""What a rank gathers: the pieces and bands that were agreed on, in their order, as its own parts of them come."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from pyint8.errors import CancelledError, Pyint8Error
from pyint8.streaming.ranks.agenda import Agenda
from pyint8.streaming.ranks.group import Group
from pyint8.streaming.ranks.meetings import Source
from pyint8.streaming.ranks.pieces import Piece

if TYPE_CHECKING:
    import torch

    from pyint8.streaming.extension import _core

# How long the thread may take to hear of something else than what it waits for.
INTERVAL_MS = 50


class Conducting(Protocol):
    """What gathering needs of the conductor."""

    def notify(self, change: Callable[[], object] = ...) -> None:
        """Changes what others may be waiting for."""

    def has_failed(self) -> bool:
        """Whether this rank's load has."""

    def guarded(self, step: Callable[..., object], *arguments: object) -> bool:
        """Takes a step towards more bytes; False if it failed."""


class Gathering:
    """On the conductor's thread.

    Args:
        group: What ranks give each other bytes by.
        agenda: What comes next.
        changed: Guards it.
        conductor: Hears of what fails.

    Attributes:
        engine: Whose pieces they are; None once it is closed.
    """

    def __init__(self, group: Group, agenda: Agenda, changed: threading.Condition, conductor: Conducting) -> None:
        self._group = group
        self._agenda = agenda
        self._changed = changed
        self._conductor = conductor
        self.engine: _core.Engine | None = None

    def all_agreed(self) -> None:
        """Everything that was agreed on, as it comes."""
        self._bring([])
        while agreed := self._agenda.agreed:
            self._bring(agreed[0])
            self._conductor.notify(agreed.popleft)

    def _bring(self, sizes: list[int]) -> None:
        """What comes next, so many of these sizes, at once; and what is read whole before the last."""
        left = deque(sizes)
        with self._changed:
            pieces = list(self._agenda.take(left))
            source = self._agenda.source
        bands = self._bands_of(source, len(left))
        pieces += self._agenda.spare_pieces(list(left)[len(bands) :], self._group.device)
        have_come = self._have_come(pieces)
        if not have_come:  # other ranks take no harm of zeros before they are told
            for piece in pieces:
                self._group.part_of(piece.memory, piece.part).zero_()
        if shared := [(piece.memory, piece.part) for piece in pieces if piece.part] + bands:
            self._group.gather(shared)
            if not have_come or self.engine is None:  # nobody else waits for it before the memory goes
                self._group.settle()
        if source is not None and bands:
            self._conductor.guarded(source.gathered, len(bands), self._group.stream)
        if have_come:
            self._keep_promises(pieces)
        self._conductor.notify()

    def _have_come(self, pieces: Sequence[Piece]) -> bool:
        """Whether this rank's parts have, once they were waited for."""
        return not self._agenda.has_dropped and self._conductor.guarded(self._await_own, pieces)

    def _bands_of(self, source: Source | None, count: int) -> list[tuple[torch.Tensor, int]]:
        """The next bands of a source, of which this rank has read its parts; none, if they will not come."""
        bands: list[tuple[torch.Tensor, int]] = []
        if source is not None and count:
            self._conductor.guarded(lambda: bands.extend(self._await_parts(source, count)))
        return bands

    def _await_parts(self, source: Source, count: int) -> list[tuple[torch.Tensor, int]]:
        while self.engine is not None and not self._conductor.has_failed():
            found = source.await_parts(count, self._group.stream, INTERVAL_MS)
            if found is not None:
                return found
        raise CancelledError("the engine was closed")

    def _keep_promises(self, pieces: Iterable[Piece]) -> None:
        if (engine := self.engine) is None:
            return
        for piece in pieces:
            with suppress(Pyint8Error):
                engine.keep_promise(piece.promised.start, len(piece.promised), self._group.stream)

    def _await_own(self, pieces: Sequence[Piece]) -> None:
        """Until this rank's parts of pieces are on their way to the device; what is gathered then comes after them."""
        tickets = [ticket for piece in pieces for ticket in piece.tickets]
        while tickets:
            engine = self.engine
            if engine is None or self._conductor.has_failed():
                raise CancelledError("the engine was closed")
            if engine.wait_all(tickets, self._group.stream, INTERVAL_MS):
                return
