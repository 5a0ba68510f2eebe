"""What is under way before there is a model: taken over by the load, or given back when the load fails before that."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from streams import CPU, TINY, bytes_of, over, requests, stored

from pyint8.checkpoint import Checkpoint
from pyint8.placement.budget import MemoryBudget
from pyint8.streaming import first_tensors
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.preparation import Preparation


@pytest.fixture
def preparation(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch, nothing_left: None) -> Preparation:
    """With a head start, for which there is no GPU here."""

    def start(checkpoint: Checkpoint, *_: Any) -> HeadStart:
        return HeadStart([FirstTensors(CPU, list(checkpoint.values()), 1 << 30)], TINY)

    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(first_tensors, "start_head_start", start)
    return Preparation(mixed, TINY)


def test_what_a_failed_load_did_not_take_is_given_back(preparation: Preparation) -> None:
    with suppress(RuntimeError), preparation:
        preparation.start_head_start("auto", MemoryBudget())
        raise RuntimeError


def test_what_was_taken_is_the_takers(preparation: Preparation, mixed: Checkpoint) -> None:
    with preparation:
        preparation.start_head_start("auto", MemoryBudget())
        transport, early = preparation.take_transport(gpus=1)
    assert set(early) == {name for name, entry in mixed.items() if entry.nbytes}
    with over(requests(mixed), transport, early) as stream:
        assert all(bytes_of(stream.whole(name)) == stored(entry) for name, entry in mixed.items())
