"""When memory is made room for, and that the collector comes back as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from pyint8.host import garbage


@pytest.mark.parametrize(
    ("initialized", "used", "free", "collects"),
    [
        (False, [5, 5], [10, 10], False),
        (True, [0, 0], [10, 10], False),
        (True, [0, 5], [10, 100], False),
        (True, [5, 0], [100, 10], False),
        (True, [0, 5], [100, 99], True),
        (True, [5, 5], [10, 10], True),
    ],
)
def test_it_collects_where_memory_is_short_and_used(
    initialized: bool, used: list[int], free: list[int], collects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized,
        device_count=lambda: 2,
        memory_allocated=used.__getitem__,
        mem_get_info=lambda gpu: (free[gpu], 1000),
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(1))
    garbage.collect_if_short(100)
    assert len(collected) == collects


@pytest.mark.parametrize("was_on", [True, False])
def test_it_is_as_before_afterwards(was_on: bool) -> None:
    (gc.enable if was_on else gc.disable)()
    try:
        with garbage.paused(), garbage.paused():
            assert not gc.isenabled()
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_what_came_is_not_looked_through_afterwards() -> None:
    class Kept:
        """To be found again."""

    gc.collect()
    with garbage.paused():
        kept = [Kept() for _ in range(5000)]
    oldest = {id(value) for value in gc.get_objects(generation=2)}
    assert all(id(value) in oldest for value in kept)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("nothing_frozen")
def test_it_is_on_again_even_if_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(garbage, "deque", refused)
    with pytest.raises(MemoryError), garbage.paused():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with garbage.paused():
            pass
        assert gc.get_freeze_count() >= frozen - 100  # some of it goes by its reference counts
    finally:
        gc.unfreeze()
