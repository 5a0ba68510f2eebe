"""One rank's part in what all do together: meetings, the gathering of pieces, and the end, whatever becomes of it.

All collectives are called by one thread, which Ctrl-C does not reach, in rounds. In each, all ranks tell each other a
few numbers: how many of the next pieces they will gather, or that they are at a meeting, or that they have failed. So
all know alike what comes next, and nobody waits for what will not come: as many pieces are gathered as all ranks have
said; at a meeting, values are exchanged; where one has failed, the others are told why, and all are done. While the
numbers of one round are on their way, the pieces of the round before are gathered, so that neither waits for the other.
A rank says that it will gather pieces before it has read its parts of them; should a read fail, it gives zeros, and
says so in the next round. The order of pieces and meetings is the same on all ranks, since it follows from the same
plan; when each has read its part is not.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pyint8.errors import CancelledError, Pyint8Error, RankError
from pyint8.streaming.ranks.agenda import MOST_PIECES, Agenda
from pyint8.streaming.ranks.group import Group
from pyint8.streaming.ranks.meetings import Meeting, Source
from pyint8.streaming.ranks.pieces import Piece

if TYPE_CHECKING:
    import torch

    from pyint8.streaming.extension import _core

# What a rank says instead of a number of pieces.
_AT_A_MEETING = -1
_HAS_FAILED = -2
# How long the thread may take to hear of something else than what it waits for.
_INTERVAL_MS = 50
# How long the load has to come with an error that the thread met first: it knows which tensor it was.
_GRACE_SECONDS = 0.5


class Conductor:
    """Has one thread, from the first that it is given to do until all ranks have met for the last time, or one failed.

    Args:
        group: What ranks tell each other by.

    Attributes:
        group: As given.
        verdict: What another rank's failure means for this one.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.verdict: RankError | None = None
        self._changed = threading.Condition()
        self._agenda = Agenda(group.size)
        self._engine: _core.Engine | None = None
        self._failure: BaseException | None = None  # of this rank, to be told
        self._told = b""
        self._doubt: tuple[BaseException, float] | None = None  # what the thread met, and when it will be told
        self._is_over = False
        self._is_running = threading.Lock()
        self._thread: threading.Thread | None = None

    def attach(self, engine: _core.Engine | None, source: Source | None = None) -> None:
        """From now on pieces are of this engine, and behind them comes what `source` has. None: it is closed."""
        with self._changed:
            self._engine = engine
            self._agenda.attach(source, is_open=engine is not None)

    def put(self, *items: Piece | Meeting) -> None:
        """Gathers pieces and holds meetings behind all that were put before; in the same order on all ranks."""
        self.notify(lambda: self._agenda.put(items))
        self._start()

    def is_done(self) -> bool:
        """Whether all that was put is gathered and held. With the lock held, as in `wait_for`."""
        return self._agenda.is_empty

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Waits until something is so; the lock is held while it is asked.

        Raises:
            RankError: Another rank failed.
            Pyint8Error: The gathering met an error.
        """
        with self._changed:
            self._changed.wait_for(lambda: predicate() or self._is_over or self._doubt is not None)
            if not predicate():
                self.check()
                raise CancelledError("the ranks are done")

    def check(self) -> None:
        """Raises what ended the gathering: RankError if another rank failed, what it met itself, or nothing."""
        if self.verdict is not None:
            raise self.verdict
        if (doubt := self._doubt) is not None:
            raise doubt[0]

    def notify(self, change: Callable[[], object] = lambda: None) -> None:
        """Changes something that `wait_for`, or the thread, may be waiting for."""
        with self._changed:
            change()
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Tells the others; returns once they know."""

        def note() -> None:
            self._failure = error

        self.notify(note)
        self._start()
        self.join()
        self._failure = self._doubt = None  # breaks reference cycles

    def join(self) -> None:
        """Waits for the last round."""
        if self._thread is not None:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over)
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            # No more than a second Ctrl-C shall be needed to leave, whatever the others do.
            self._thread = threading.Thread(target=self._run, name="pyint8 ranks", daemon=True)
        if not self._is_running.locked():
            with suppress(RuntimeError):  # it was started, but does not run yet
                self._thread.start()

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if not self._is_running.acquire(blocking=False):  # Ctrl-C came while it was started: there are two
            return
        try:
            with self.group.used():
                while self._round():
                    pass
        except BaseException as error:  # a rank is gone, or the network
            verdict = RankError(f"the ranks cannot reach each other any more: {_said(error)}")
            verdict.__cause__ = error
            self._end(verdict)
        self._end(None)
        self.group.leave()

    def _round(self) -> bool:
        """One round; False if it was the last."""
        code, length, sizes = self._next_to_say()
        hear = self.group.tell([code, length, self._agenda.batch_bytes, *sizes, *[0] * (MOST_PIECES - len(sizes))])
        self._gather()
        said = hear()
        codes = [of_rank[0] for of_rank in said]
        if _HAS_FAILED in codes:
            return self._tell_failures([length if code == _HAS_FAILED else 0 for code, length, *_ in said])
        if set(codes) == {_AT_A_MEETING}:
            return self._hold([of_rank[1] for of_rank in said])
        count = max(0, min(codes))
        is_torn = _AT_A_MEETING in codes and any(code > 0 for code in codes)
        if is_torn or any(of_rank[3 : 3 + count] != sizes[:count] for of_rank in said):
            return self._diverge("they are about to gather different things")
        self._agenda.agree(sizes[:count], min(of_rank[2] for of_rank in said))
        return True

    def _next_to_say(self) -> tuple[int, int, list[int]]:
        """A code or how many pieces to gather, the length of a message, the sizes of pieces."""
        while (found := self._failed() or self._stepped()) is None:
            pass
        return found

    def _failed(self) -> tuple[int, int, list[int]] | None:
        with self._changed:
            if self._failure is None and self._doubt is not None and time.monotonic() > self._doubt[1]:
                self._failure = self._doubt[0]
            if self._failure is None:
                return None
            self._told = _message(self._failure)  # another error may come before the round is over
            return _HAS_FAILED, len(self._told), []

    def _stepped(self) -> tuple[int, int, list[int]] | None:
        """What there is to say, or None after waiting a little."""
        with self._changed:
            if (sizes := self._agenda.proposal()) is not None:
                return len(sizes), 0, sizes
            if isinstance(head := self._agenda.head, Meeting) and self._doubt is None:
                return _AT_A_MEETING, len(head.message), []
            self._changed.wait_for(self._is_wanted, _INTERVAL_MS / 1000)
        return None

    def _guarded(self, step: Callable[..., object], *arguments: Any) -> bool:
        """Takes a step towards more bytes; False if it failed."""
        try:
            step(*arguments)
        except CancelledError:  # the load has closed the engine: it will say why, or goes on without
            self.notify(self._agenda.drop)
        except BaseException as error:
            self._doubt_it(error)
        else:
            return True
        return False

    def _is_wanted(self) -> bool:
        has_more = self._agenda.head is not None or self._agenda.source_has_more
        return self._failure is not None or (self._doubt is None and has_more)

    def _doubt_it(self, error: BaseException) -> None:
        def note() -> None:
            self._agenda.drop()
            self._doubt = self._doubt or (error, time.monotonic() + _GRACE_SECONDS)

        self.notify(note)

    def _gather(self) -> None:
        """Everything that was agreed on, as it comes."""
        self._bring([])
        while agreed := self._agenda.agreed:
            self._bring(agreed[0])
            self.notify(agreed.popleft)

    def _bring(self, sizes: list[int]) -> None:
        """What comes next, so many of these sizes, at once; and what is read whole before the last."""
        left = deque(sizes)
        with self._changed:
            pieces = list(self._agenda.take(left))
            source = self._agenda.source
        bands = self._bands_of(source, len(left))
        pieces += self._agenda.spare_pieces(list(left)[len(bands) :], self.group.device)
        have_come = [not self._agenda.has_dropped and self._guarded(self._await_own, piece) for piece in pieces]
        for piece, has_come in zip(pieces, have_come, strict=True):
            if not has_come:  # other ranks take no harm of zeros before they are told
                self.group.part_of(piece.memory, piece.part).zero_()
        if shared := [(piece.memory, piece.part) for piece in pieces if piece.part] + bands:
            self.group.gather(shared)
        if source is not None and bands:
            self._guarded(source.gathered, len(bands), self.group.stream)
        self._keep_promises(piece for piece, has_come in zip(pieces, have_come, strict=True) if has_come)
        self.notify()

    def _bands_of(self, source: Source | None, count: int) -> list[tuple[torch.Tensor, int]]:
        """The next bands of a source, of which this rank has read its parts; none, if they will not come."""
        bands: list[tuple[torch.Tensor, int]] = []
        if source is not None and count:
            self._guarded(lambda: bands.extend(self._await_parts(source, count)))
        return bands

    def _await_parts(self, source: Source, count: int) -> list[tuple[torch.Tensor, int]]:
        while self._engine is not None and self._failure is None:
            found = source.await_parts(count, self.group.stream, _INTERVAL_MS)
            if found is not None:
                return found
        raise CancelledError("the engine was closed")

    def _keep_promises(self, pieces: Iterable[Piece]) -> None:
        if (engine := self._engine) is None:
            return
        for piece in pieces:
            with suppress(Pyint8Error):
                engine.keep_promise(piece.promised.start, len(piece.promised), self.group.stream)

    def _await_own(self, piece: Piece) -> None:
        """Until this rank's part of a piece is on its way to the device; what is gathered then comes after it."""
        for ticket in piece.tickets:
            while (engine := self._engine) is not None and self._failure is None:
                if engine.is_on_its_way(ticket, _INTERVAL_MS):
                    engine.wait(ticket, self.group.stream)
                    break
            else:
                raise CancelledError("the engine was closed")

    def _hold(self, lengths: list[int]) -> bool:
        meeting = self._agenda.head
        assert isinstance(meeting, Meeting)
        heard = [json.loads(message) for message in self.group.messages(meeting.message, lengths)]
        if len({stage for stage, _ in heard}) > 1:
            return self._diverge("they are at " + ", ".join(f"{stage!r}" for stage, _ in heard))

        def note() -> None:
            self._agenda.take_meeting().values = [value for _, value in heard]

        self.notify(note)
        return not meeting.is_last

    def _tell_failures(self, lengths: list[int]) -> bool:
        heard = self.group.messages(self._told, lengths)
        if not self._told:
            rank = next(rank for rank, length in enumerate(lengths) if length)
            problem = f"rank {rank} of {self.group.size} failed: {heard[rank].decode(errors='replace')}"
            self._end(RankError(problem, rank=rank))
        return False

    def _diverge(self, how: str) -> bool:
        self._end(
            RankError(
                f"the {self.group.size} ranks do not load the same ({how}); all must call it alike: the same "
                "checkpoint, arguments, options and versions"
            )
        )
        return False

    def _end(self, verdict: RankError | None) -> None:
        """No more rounds. The engine is closed if that was no good end, so that waits for it end."""
        with self._changed:
            self.verdict = self.verdict or verdict
            self._is_over = True
            engine = self._engine if verdict is not None or self._doubt is not None else None
            self._agenda.clear()
            self._changed.notify_all()
        if engine is not None:
            with suppress(Pyint8Error):
                engine.close()


def _message(error: BaseException) -> bytes:
    return _said(error).encode(errors="replace")[:4096]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
