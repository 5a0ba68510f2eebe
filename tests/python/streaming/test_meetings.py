"""Meetings of ranks: when they are held."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_ranks import on_ranks
from streams import CPU, bytes_of, over, requests, stored

from pyint8 import StreamOptions
from pyint8.checkpoint import Checkpoint
from pyint8.errors import RankError, ReadError
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.conductor import Conductor
from pyint8.streaming.ranks.group import Group
from pyint8.streaming.ranks.meetings import Meeting
from pyint8.streaming.ranks.ranks import Ranks


class SlowEngine:
    """Brings pieces 0 to 4 at once, the next two once a meeting is wanted, and the others once it was held."""

    def __init__(self, conductor: Conductor, meeting: Meeting) -> None:
        self._conductor = conductor
        self._meeting = meeting

    def wait_all(self, tickets: list[int], stream: int, milliseconds: int) -> bool:
        time.sleep(0.001)
        was_held, is_wanted = self._meeting.values is not None, self._conductor._agenda.urgent is not None
        return all(ticket < 5 or was_held or (ticket < 7 and is_wanted) for ticket in tickets)

    def keep_promise(self, first: int, count: int, stream: int) -> None:
        """Nobody waits for it."""


def test_some_meetings_need_not_wait_for_pieces_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_LEAST_BYTES", "_FIRST_BYTES", "_MOST_BYTES"):
        monkeypatch.setattr(f"pyint8.streaming.ranks.agenda.{limit}", 1)

    def load(ranks: Ranks, rank: int) -> list[int]:
        conductor, meeting = ranks._conductor, Meeting("now", rank, is_urgent=True)
        conductor.attach(SlowEngine(conductor, meeting))  # type: ignore[arg-type]
        one = range(1)
        for number in range(12):
            conductor.put(pieces.Piece(torch.zeros(64, dtype=torch.uint8), 32, range(number, number + 1), one))
        values = conductor.hold(meeting)
        conductor.wait_for(conductor.is_done)
        return values

    assert on_ranks(2, load) == [[0, 1]] * 2


def test_a_device_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank is gone, what it was given is never done."""
    monkeypatch.setattr("pyint8.streaming.ranks.group._LETTING_GO_SECONDS", 0.1)
    group, answers = object.__new__(Group), iter([False, False, True])
    group._side = SimpleNamespace(query=lambda: next(answers))  # type: ignore[assignment]
    group.settle()
    assert next(answers, None) is None
    group._side = SimpleNamespace(query=lambda: False)  # type: ignore[assignment]
    began = time.monotonic()
    group.settle()
    assert 0.1 <= time.monotonic() - began < 5


class SlowPiece(pieces.Piece):
    """Takes its time to say how large it is."""

    @property
    def nbytes(self) -> int:
        time.sleep(0.001)
        return super().nbytes


def test_pieces_are_put_while_ranks_agree_on_others() -> None:
    def load(ranks: Ranks, _: int) -> bool:
        conductor = ranks._conductor
        for _ in range(20):
            conductor.put(SlowPiece(torch.zeros(64, dtype=torch.uint8), 32, range(0), range(1)))
            time.sleep(0.001)
        conductor.wait_for(conductor.is_done)
        return True

    assert on_ranks(2, load) == [True, True]


@pytest.mark.parametrize("meets", [True, False])
def test_a_rank_that_is_refused_a_thread_tells_the_others(meets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, []

    def refuse_the_first(thread: threading.Thread) -> None:
        if thread.name == "pyint8 ranks" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    def meet(ranks: Ranks, rank: int) -> Any:
        return ranks.meet("here", rank) if meets else None

    monkeypatch.setattr(threading.Thread, "start", refuse_the_first)
    own, other = sorted(on_ranks(2, meet), key=lambda error: isinstance(error, RankError))
    assert isinstance(own, ReadError)
    assert "cannot start a thread (raise `ulimit -u`" in str(own)
    assert str(other).endswith(f" of 2 failed: ReadError: {own}")


def test_a_rank_that_is_refused_a_thread_begins_as_the_others_do(
    mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    thread_start, refused_rank = threading.Thread.start, threading.local()

    def refuse_rank_1(thread: threading.Thread) -> None:
        if thread.name == "pyint8 head start" and getattr(refused_rank, "is_this", False):
            raise RuntimeError("can't start new thread")
        thread_start(thread)

    def load(ranks: Ranks, rank: int) -> tuple[int, dict[str, bytes]]:
        refused_rank.is_this = rank == 1
        start = HeadStart([CPU], StreamOptions(threads=2), ranks=ranks)
        start.begin([FirstTensors(CPU, list(mixed.values()), 1 << 30)])
        transport, early, _ = start.take()
        asked = len(early)
        with over(requests(mixed), transport, early) as stream:
            found = {name: bytes_of(stream.whole(name)) for name in mixed}
            stream.finish()
            return asked, found

    monkeypatch.setattr(threading.Thread, "start", refuse_rank_1)
    for asked, found in on_ranks(2, load):
        assert asked == sum(entry.nbytes > 0 for entry in mixed.values())
        assert found == {name: stored(entry) for name, entry in mixed.items()}
