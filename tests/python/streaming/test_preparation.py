"""What is under way before there is a model: taken over by the load, or given back when the load fails before that."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from streams import CPU, TINY, bytes_of, over, requests, stored

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import Checkpoint
from pyint8.placement.budget import MemoryBudget
from pyint8.streaming import first_tensors
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.lane import Lane
from pyint8.streaming.preparation import Preparation

__all__ = ["driver"]  # a fixture

GPU = torch.device("cuda", 0)


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


@pytest.mark.parametrize("is_taken", [True, False])
def test_an_engine_that_is_opened_ahead_asks_for_nothing(
    driver: FakeDriver, mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch, is_taken: bool
) -> None:
    def opened(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        lane = driver.lane(engine, device, options)
        lane.device = device
        return lane

    monkeypatch.setattr("pyint8.streaming.head_start.HeadStart", partial(HeadStart, opener=opened))
    with Preparation(mixed, TINY) as preparation:
        preparation.open_engine([GPU, CPU, GPU])
        if is_taken:
            transport, early = preparation.take_transport(gpus=1)
            assert early == {}
            assert _core.pinned_bytes_in_use() > 0
            assert transport.stats()["bytes_read"] == 0
            transport.close()
    assert _core.pinned_bytes_in_use() == 0


def test_host_memory_needs_no_engine_ahead(mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyint8.streaming.head_start.HeadStart", None)
    with Preparation(mixed, TINY) as preparation:
        preparation.open_engine([CPU])
        transport, early = preparation.take_transport(gpus=0)
    transport.close()
    assert early == {}
