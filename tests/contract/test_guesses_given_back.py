"""What was begun of guessed experts is given back at once: whoever catches an error may try something smaller."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from guessing import Load, begun, default_stream, folder, load, other_order

from pyint8 import _core
from pyint8.models.transformers import parameters
from pyint8.streaming.made import Place
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import TensorRequest

__all__ = ["begun", "default_stream", "driver", "folder", "load"]  # fixtures

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.fixture
def wholes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Every tensor that experts land in, while Python collects no cycles."""
    found: list[weakref.ref[torch.Tensor]] = []
    allocate = Pour._allocate

    def noting(self: Pour, request: TensorRequest) -> Place:
        place = allocate(self, request)
        if request.part is not None:
            found.append(weakref.ref(place.made.tensor))
        return place

    monkeypatch.setattr(Pour, "_allocate", noting)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def alive(wholes: list[weakref.ref[torch.Tensor]]) -> int:
    return sum(each() is not None for each in wholes)


@pytest.mark.parametrize("experts", [True, False])
def test_streams_and_contexts_do_not_wait_for_the_collector(
    load: Load, folder: Path, experts: bool, driver: FakeDriver, wholes: list[Any]
) -> None:
    model = load(folder, experts=experts)
    assert not any(driver.counters().values())
    del model


@pytest.mark.parametrize("where", ["maker", "stream"])
def test_a_load_that_fails_gives_memory_back_at_once(
    load: Load, folder: Path, where: str, wholes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever catches the error may try something smaller."""

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    if where == "maker":
        monkeypatch.setattr(parameters, "_reserve_memory", fail)
        monkeypatch.setattr("pyint8.streaming.preparation.Preparation.reserves_memory", False)
    else:
        monkeypatch.setattr("pyint8.streaming.stream.open_pours", fail)
    with suppress(torch.OutOfMemoryError):
        load(folder, experts=True)
    assert len(wholes) > 0
    assert alive(wholes) == 0


def test_a_wrong_guess_gives_memory_back_before_more_is_taken(
    load: Load, folder: Path, wholes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    other_order(monkeypatch)
    left: list[int] = []
    make = parameters.TensorStream

    def looking(*arguments: Any, **options: Any) -> Any:
        left.append(alive(wholes))
        return make(*arguments, **options)

    monkeypatch.setattr(parameters, "TensorStream", looking)
    load(folder, experts=True)
    assert len(wholes) > 0
    assert left == [0]
