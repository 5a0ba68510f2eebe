"""What is under way before there is a model: taken over by the load, or given back when the load fails before that."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from streams import CPU, TINY, bytes_of, over, requests, stored

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import Checkpoint
from pyint8.operations.common import opened_engine, opened_engine_for
from pyint8.placement import device_map
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

    def parts(checkpoint: Checkpoint, *_: Any, is_bounded: bool, guess: Any) -> list[FirstTensors]:
        return [FirstTensors(CPU, list(checkpoint.values()), 1 << 30)]

    monkeypatch.setattr("pyint8.streaming.head_start._WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(first_tensors, "open_head_start", lambda *_, is_bounded: HeadStart([CPU], TINY))
    monkeypatch.setattr(first_tensors, "first_tensors", parts)
    return Preparation(mixed, TINY)


def test_what_a_failed_load_did_not_take_is_given_back(preparation: Preparation) -> None:
    with suppress(RuntimeError), preparation:
        preparation.start_head_start("auto", MemoryBudget())
        raise RuntimeError


def test_what_was_taken_is_the_takers(preparation: Preparation, mixed: Checkpoint) -> None:
    with preparation:
        preparation.start_head_start("auto", MemoryBudget())
        transport, early, _ = preparation.take_over(gpus=1)
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
    with ExitStack() as stack:
        engine = opened_engine_for(stack, [GPU, CPU, GPU], TINY)
        preparation = stack.enter_context(Preparation(mixed, TINY, opened=engine))
        if is_taken:
            transport, early, _ = preparation.take_over(gpus=1)
            assert early == {}
            assert _core.pinned_bytes_in_use() > 0
            assert transport.stats()["bytes_read"] == 0
            transport.close()
    assert _core.pinned_bytes_in_use() == 0


def test_host_memory_needs_no_engine_ahead() -> None:
    with ExitStack() as stack:
        assert opened_engine_for(stack, [CPU], TINY) is None


def test_an_engine_that_is_opened_ahead_is_the_loads(
    preparation: Preparation, mixed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_tensors, "open_head_start", None)  # not another one
    engine = HeadStart([CPU], TINY)
    with Preparation(mixed, TINY, opened=engine) as preparation:
        preparation.start_head_start(0, MemoryBudget())
        transport, early, _ = preparation.take_over(gpus=1)
    assert set(early) == {name for name, entry in mixed.items() if entry.nbytes}
    with over(requests(mixed), transport, early) as stream:
        assert all(bytes_of(stream.whole(name)) == stored(entry) for name, entry in mixed.items())
    engine.close()


def test_an_engine_is_opened_ahead_only_where_there_is_a_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context, or importing torch, takes longer than headers do."""
    opened: list[Any] = []

    def open_head_start(device_map: Any, options: Any, ranks: Any, *, is_bounded: bool) -> HeadStart:
        opened.append((device_map, is_bounded))
        return HeadStart([CPU], options)

    monkeypatch.setattr(first_tensors, "open_head_start", open_head_start)
    monkeypatch.setattr(device_map, "check_device_map", lambda _: None)
    for is_there, is_bounded in [(False, False), (True, False), (True, True)]:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_there)  # noqa: B023
        with monkeypatch.context() as patch, ExitStack() as stack:
            patch.setattr(torch.cuda, "current_stream", lambda _: None)
            patch.setattr(torch.cuda, "stream", lambda _: nullcontext())
            assert (opened_engine(stack, "auto", TINY, None, is_bounded=is_bounded) is not None) == is_there
    assert opened == [("auto", False), ("auto", True)]
