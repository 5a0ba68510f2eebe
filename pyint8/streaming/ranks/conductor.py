"""One rank's part in what all do together: meetings, the gathering of pieces, and the end, whatever becomes of it.

All collectives are called by one thread, which Ctrl-C does not reach, in rounds. In each, all ranks first tell each
other a few numbers: how many of the next pieces they have read their parts of, or that they are at a meeting, or that
they have failed. So all know alike what comes next, and nobody waits for what will not come: as many pieces are
gathered as all have read; at a meeting, values are exchanged; where one has failed, the others are told why, and all
are done. The order of pieces and meetings is the same on all ranks, since it follows from the same plan; when each has
read its part is not.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from pyint8.errors import CancelledError, Pyint8Error, RankError
from pyint8.streaming.ranks.group import Group
from pyint8.streaming.ranks.meetings import Meeting, Source
from pyint8.streaming.ranks.pieces import Piece

if TYPE_CHECKING:
    from pyint8.streaming.extension import _core

# Of pieces in one round.
_MOST_PIECES = 32
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
        self._queue: deque[Piece | Meeting] = deque()
        self._engine: _core.Engine | None = None
        self._source: Source | None = None
        self._failure: BaseException | None = None  # of this rank, to be told
        self._told = b""
        self._doubt: tuple[BaseException, float] | None = None  # what the thread met, and when it will be told
        self._is_over = False
        self._is_running = threading.Lock()
        self._thread: threading.Thread | None = None

    def attach(self, engine: _core.Engine | None, source: Source | None = None) -> None:
        """From now on pieces are of this engine, and more of them come from `source`. None: it is closed."""
        with self._changed:
            self._engine, self._source = engine, source

    def put(self, *items: Piece | Meeting) -> None:
        """Gathers pieces and holds meetings behind all that were put before; in the same order on all ranks."""
        self.notify(lambda: self._queue.extend(items))
        self._start()

    def is_done(self) -> bool:
        """Whether all that was put is gathered and held. With the lock held, as in `wait_for`."""
        return not self._queue and not self._source_has_more()

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Waits until something is so; the lock is held while it is asked.

        Raises:
            RankError: Another rank failed.
            Pyint8Error: The gathering met an error.
        """
        with self._changed:
            self._changed.wait_for(lambda: predicate() or self._is_over or self._doubt is not None)
            if predicate():
                return
            if self.verdict is not None:
                raise self.verdict
            raise self._doubt[0] if self._doubt is not None else CancelledError("the ranks are done")

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

    def _round(self) -> bool:
        """One round; False if it was the last."""
        numbers = self._next_numbers()
        said = self.group.numbers(numbers)
        codes = [of_rank[0] for of_rank in said]
        if _HAS_FAILED in codes:
            return self._tell_failures([length if code == _HAS_FAILED else 0 for code, length, *_ in said])
        if set(codes) == {_AT_A_MEETING}:
            return self._hold([of_rank[1] for of_rank in said])
        count = min(codes)
        if count <= 0 or any(of_rank[2 : 2 + count] != numbers[2 : 2 + count] for of_rank in said):
            return self._diverge("they are about to gather different things")
        self._gather(count)
        return True

    def _next_numbers(self) -> list[int]:
        """What to say next: a code or how many pieces are ready, the length of a message, the sizes of pieces."""
        while True:
            found = self._failed() or self._stepped()
            if found is not None:
                code, length, sizes = found
                return [code, length, *sizes, *[0] * (_MOST_PIECES - len(sizes))]

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
            source, engine = self._source if self._source_has_more() else None, self._engine
        try:
            if source is not None:
                source.feed()
            if self._queue:
                head = self._queue[0]
                return (_AT_A_MEETING, len(head.message), []) if isinstance(head, Meeting) else self._ready(engine)
            if source is not None:
                source.await_room()
                return None
        except CancelledError:  # the load has closed the engine: it will say why, or goes on without
            self._drop_pieces()
        except BaseException as error:
            self._doubt_it(error)
        with self._changed:
            self._changed.wait_for(self._is_wanted, _INTERVAL_MS / 1000)
        return None

    def _source_has_more(self) -> bool:
        return self._source is not None and self._source.has_more()

    def _is_wanted(self) -> bool:
        return bool(self._queue) or self._failure is not None or self._source_has_more()

    def _drop_pieces(self) -> None:
        def drop() -> None:
            self._queue = deque(item for item in self._queue if isinstance(item, Meeting))
            self._source = None

        self.notify(drop)

    def _doubt_it(self, error: BaseException) -> None:
        self._drop_pieces()

        def note() -> None:
            self._doubt = self._doubt or (error, time.monotonic() + _GRACE_SECONDS)

        self.notify(note)

    def _ready(self, engine: _core.Engine | None) -> tuple[int, int, list[int]] | None:
        """The first pieces of which this rank has read its part; what all read whole is done with on the way."""
        if engine is None:
            raise CancelledError("the engine was closed")
        sizes: list[int] = []
        with self._changed:
            snapshot = list(islice(self._queue, 2 * _MOST_PIECES))
        for number, piece in enumerate(snapshot):
            wait = 0 if number else _INTERVAL_MS
            if isinstance(piece, Meeting) or not all(engine.is_on_its_way(t, wait) for t in piece.tickets):
                break
            if piece.part:
                sizes.append(piece.nbytes)
            elif not sizes:
                self._arrived(piece, engine)
            if len(sizes) == _MOST_PIECES:
                break
        return (len(sizes), 0, sizes) if sizes else None

    def _gather(self, count: int) -> None:
        """The next `count` pieces; those between them that all read whole go with them."""
        while count:
            piece = self._queue[0]
            assert isinstance(piece, Piece)
            self._arrived(piece, self._engine)
            count -= bool(piece.part)

    def _arrived(self, piece: Piece, engine: _core.Engine | None) -> None:
        """Gathers a piece. If the engine was closed meanwhile, the others get their bytes nevertheless."""
        with suppress(Pyint8Error):
            if engine is not None:
                for ticket in piece.tickets:
                    engine.wait(ticket, self.group.stream)
        if piece.part:
            self.group.gather(piece.memory, piece.part)
        with suppress(Pyint8Error):
            if engine is not None:
                engine.keep_promise(piece.promised.start, len(piece.promised), self.group.stream)
        self.notify(self._queue.popleft)

    def _hold(self, lengths: list[int]) -> bool:
        meeting = self._queue[0]
        assert isinstance(meeting, Meeting)
        heard = [json.loads(message) for message in self.group.messages(meeting.message, lengths)]
        if len({stage for stage, _ in heard}) > 1:
            return self._diverge("they are at " + ", ".join(f"{stage!r}" for stage, _ in heard))

        def note() -> None:
            meeting.values = [value for _, value in heard]
            self._queue.popleft()

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
        """No more rounds. The engine is closed after a verdict, so that waits for it end."""
        with self._changed:
            self.verdict = self.verdict or verdict
            self._is_over = True
            engine = self._engine
            self._queue.clear()
            self._source = None
            self._changed.notify_all()
        if verdict is not None and engine is not None:
            with suppress(Pyint8Error):
                engine.close()


def _message(error: BaseException) -> bytes:
    return _said(error).encode(errors="replace")[:4096]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
