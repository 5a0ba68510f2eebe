"""Meetings of ranks: when they are held."""

from __future__ import annotations

import time

import pytest
import torch
from local_ranks import on_ranks

from pyint8.streaming.ranks import pieces
from pyint8.streaming.ranks.conductor import Conductor
from pyint8.streaming.ranks.meetings import Meeting
from pyint8.streaming.ranks.ranks import Ranks


class SlowEngine:
    """Brings pieces 0 to 4 at once, the next two once a meeting is wanted, and the others once it was held."""

    def __init__(self, conductor: Conductor, meeting: Meeting) -> None:
        self._conductor = conductor
        self._meeting = meeting

    def is_on_its_way(self, ticket: int, milliseconds: int) -> bool:
        time.sleep(0.001)
        was_held = self._meeting.values is not None
        return ticket < 5 or was_held or (ticket < 7 and self._conductor._agenda.urgent is not None)

    def wait(self, ticket: int, stream: int) -> None:
        """It is there."""

    def keep_promise(self, first: int, count: int, stream: int) -> None:
        """Nobody waits for it."""


def test_some_meetings_need_not_wait_for_pieces_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.ranks.agenda._MOST_BYTES", 1)

    def load(ranks: Ranks, rank: int) -> list[int]:
        conductor, meeting = ranks._conductor, Meeting("now", rank)
        conductor.attach(SlowEngine(conductor, meeting))  # type: ignore[arg-type]
        one = range(1)
        for number in range(12):
            conductor.put(pieces.Piece(torch.zeros(64, dtype=torch.uint8), 32, range(number, number + 1), one))
        values = conductor.meet(meeting)
        conductor.wait_for(conductor.is_done)
        return values

    assert on_ranks(2, load) == [[0, 1]] * 2
