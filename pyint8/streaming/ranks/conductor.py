"""One rank's part in what all do together: meetings, the gathering of pieces, and the end, whatever becomes of it.

All collectives are called by one thread, which Ctrl-C does not reach, in rounds. In each, all ranks tell each other a
few numbers: how many of the next pieces they will gather, or that they are at a meeting, or that they have failed. So
all know alike what comes next, and nobody waits for what will not come: as many pieces are gathered as all ranks have
said; at a meeting, values are exchanged (some need not wait for what is to be gathered before them); where one has
failed, the others are told why, and all are done. While the numbers of one round are on their way, the pieces of the
round before are gathered, so that neither waits for the other. A rank says that it will gather pieces before it has
read its parts of them; should a read fail, it gives zeros, and says so in the next round. The order of pieces and
meetings is the same on all ranks, since it follows from the same plan; when each has read its part is not.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyint8.errors import CancelledError, Pyint8Error, RankError, ReadError
from pyint8.streaming.ranks.agenda import MOST_PIECES, Agenda
from pyint8.streaming.ranks.gathering import INTERVAL_MS, Gathering
from pyint8.streaming.ranks.group import Group
from pyint8.streaming.ranks.meetings import Meeting, Source
from pyint8.streaming.ranks.pieces import Piece

if TYPE_CHECKING:
    from pyint8.streaming.extension import _core

# What a rank says instead of a number of pieces.
_AT_A_MEETING = -1
_HAS_FAILED = -2
# How long the load has to come with an error that the thread met first: it knows which tensor it was.
_GRACE_SECONDS = 0.5


@dataclass(frozen=True)
class _Words:
    """What a rank says in a round.

    Attributes:
        code: How many pieces it will gather next, or one of the above.
        length: Of a message that comes with it.
        sizes: Of those pieces.
        meeting: That it is at.
    """

    code: int
    length: int = 0
    sizes: Sequence[int] = ()
    meeting: Meeting | None = None


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
        self._gathering = Gathering(group, self._agenda, self._changed, self)
        self._failure: BaseException | None = None  # of this rank, to be told
        self._told = b""
        self._doubt: tuple[BaseException, float] | None = None  # what the thread met, and when it will be told
        self._is_over = False
        self._is_running = threading.Lock()
        self._thread: threading.Thread | None = None

    def attach(self, engine: _core.Engine | None, source: Source | None = None) -> None:
        """From now on pieces are of this engine, and behind them comes what `source` has. None: it is closed."""
        with self._changed:
            self._gathering.engine = engine
            self._agenda.attach(source, is_open=engine is not None)

    def put(self, *items: Piece | Meeting) -> None:
        """Gathers pieces and holds meetings behind all that were put before; in the same order on all ranks.

        Raises as `wait_for` once all is over: whoever waits for these would wait for ever.
        """
        self.notify(lambda: self._agenda.put(items))
        self.wait_for(lambda: not self._is_over)
        self._start()

    def hold(self, meeting: Meeting) -> list[Any]:
        """Holds a meeting behind all that was put before; returns its values. Raises as `wait_for`."""
        self.put(meeting)
        self.wait_for(lambda: meeting.values is not None)
        assert meeting.values is not None
        return meeting.values

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
            self.check()  # first: nothing is left to be gathered after an error either
            if not predicate():
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
        try:
            self._start()
        except ReadError:  # there is no other thread to tell them
            self._run()
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
        if self._is_running.locked():
            return
        try:
            self._thread.start()
        except RuntimeError as error:
            if "new thread" in str(error):  # else it was started, but does not run yet
                self._thread = None
                problem = "cannot start a thread (raise `ulimit -u`, or end other processes)"
                raise ReadError(problem, errno=errno.EAGAIN) from error

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
        mine = self._next_to_say()
        urgent = self._agenda.urgent
        words = [mine.code, mine.length, self._agenda.batch_bytes, 0 if urgent is None else len(urgent.message)]
        hear = self.group.tell([*words, *mine.sizes, *[0] * (MOST_PIECES - len(mine.sizes))])
        nbytes, began = self._agenda.agreed_bytes, time.monotonic()
        self._gathering.all_agreed()
        self._agenda.note_speed(nbytes, time.monotonic() - began)
        said = hear()
        codes = [of_rank[0] for of_rank in said]
        if _HAS_FAILED in codes:
            return self._tell_failures([length if code == _HAS_FAILED else 0 for code, length, *_ in said])
        if urgent is not None and all(of_rank[3] for of_rank in said):
            return self._hold(urgent, [of_rank[3] for of_rank in said])
        if mine.meeting is not None and set(codes) == {_AT_A_MEETING}:
            return self._hold(mine.meeting, [of_rank[1] for of_rank in said])
        return self._agree(mine.sizes, said)

    def _agree(self, mine: Sequence[int], said: list[list[int]]) -> bool:
        codes, batch_bytes = [of_rank[0] for of_rank in said], min(of_rank[2] for of_rank in said)
        count = max(0, min(codes))
        is_torn = _AT_A_MEETING in codes and any(code > 0 for code in codes)
        if is_torn or any(of_rank[4 : 4 + count] != mine[:count] for of_rank in said):
            return self._diverge("they are about to gather different things")
        self.notify(lambda: self._agenda.agree(mine[:count], self.group.batch_bytes, batch_bytes))
        return True

    def _next_to_say(self) -> _Words:
        while (found := self._failed() or self._stepped()) is None:
            pass
        return found

    def _failed(self) -> _Words | None:
        with self._changed:
            if self._failure is None and self._doubt is not None and time.monotonic() > self._doubt[1]:
                self._failure = self._doubt[0]
            if self._failure is None:
                return None
            self._told = _message(self._failure)  # another error may come before the round is over
            return _Words(_HAS_FAILED, len(self._told))

    def _stepped(self) -> _Words | None:
        """What there is to say, or None after waiting a little."""
        with self._changed:
            if (sizes := self._agenda.proposal()) is not None:
                return _Words(len(sizes), sizes=sizes)
            if (meeting := self._agenda.next_meeting) is not None and self._doubt is None:
                return _Words(_AT_A_MEETING, len(meeting.message), meeting=meeting)
            self._changed.wait_for(self._is_wanted, INTERVAL_MS / 1000)
        return None

    def has_failed(self) -> bool:
        return self._failure is not None

    def guarded(self, step: Callable[..., object], *arguments: Any) -> bool:
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
        return self._failure is not None or (self._doubt is None and not self._agenda.is_empty)

    def _doubt_it(self, error: BaseException) -> None:
        def note() -> None:
            self._agenda.drop()
            self._doubt = self._doubt or (error, time.monotonic() + _GRACE_SECONDS)

        self.notify(note)

    def _hold(self, meeting: Meeting, lengths: list[int]) -> bool:
        heard = [json.loads(message) for message in self.group.messages(meeting.message, lengths)]
        if len({stage for stage, _ in heard}) > 1:
            return self._diverge("they are at " + ", ".join(f"{stage!r}" for stage, _ in heard))
        values = [value for _, value in heard]
        try:
            meeting.check(values)
        except RankError as verdict:
            self._end(verdict)
            return False

        def note() -> None:
            self._agenda.remove(meeting)
            meeting.values = values

        self.notify(note)
        return not meeting.is_last

    def _tell_failures(self, lengths: list[int]) -> bool:
        heard = self.group.messages(self._told, lengths)
        if not self._told:
            rank, said = next((rank, each.decode(errors="replace")) for rank, each in enumerate(heard) if each)
            kind, problem = said.partition(":")[0], f"rank {rank} of {self.group.size} failed: {said}"
            self._end(RankError(problem, rank=rank, kind=kind))
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
            engine = self._gathering.engine if verdict is not None or self._doubt is not None else None
            self._agenda.clear()
            self._changed.notify_all()
        if engine is not None:
            with suppress(Pyint8Error):
                engine.close()


def _message(error: BaseException) -> bytes:
    return _said(error).encode(errors="replace")[:4096]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
