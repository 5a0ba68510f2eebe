"""Experts that land in their place before there is a plan, as it was guessed; over the fake driver, whose GPU's memory
torch takes for the host's."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver, driver
from oracle import state
from pours import GPU
from zoo import ZOO, CheckpointStore

import pyint8
from pyint8 import StreamOptions, _core
from pyint8.models.transformers import loading, parameters
from pyint8.streaming import first_tensors, guesses, head_start
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.lane import Lane
from pyint8.streaming.pour import Pour

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")

CPU = torch.device("cpu")
LOST = "all is read again"
Load = Callable[..., Any]


class WithContext(HeadStart):
    """Of a process that has used the GPU before."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._has_context = True


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many requests a head start had results made, of each load."""
    found: list[int] = []

    def made(*arguments: Any) -> Pour:
        found.append(len(arguments[2]))
        return Pour(*arguments)

    monkeypatch.setattr(head_start, "Pour", made)
    return found


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, checkpoints: CheckpointStore) -> Path:
    return checkpoints.folder(ZOO[request.param], "bf16")


@pytest.fixture(scope="module", autouse=True)
def default_stream() -> None:
    """The fake's has a thread, which the process keeps from its first use on."""
    if path := os.environ.get("PYINT8_TEST_LIBCUDA"):
        FakeDriver(path).synchronize(0)


@pytest.fixture
def load(folder: Path, nothing_left: None, driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`pyint8.load` onto the fake's GPU."""

    def opener(engine: _core.Engine, _: torch.device, options: StreamOptions) -> Lane:
        return driver.lane(engine, GPU, options)

    monkeypatch.setattr(first_tensors, "first_gpu", lambda _: (CPU, True))
    monkeypatch.setattr(first_tensors, "HeadStart", partial(WithContext, opener=opener))
    for user in (loading, parameters):
        monkeypatch.setattr(user, "find_entry_point", lambda: driver.quantizer)
    options = StreamOptions(threads=2, slot_bytes=8192, device_scratch=1 << 20)

    def loaded(folder: Path, *, experts: bool, **arguments: Any) -> Any:
        config = pyint8.Int8Config(experts=experts, **arguments)
        arguments = {"dtype": "auto", "progress": False, "options": options}
        model = pyint8.load(folder, {"": "cpu"}, config=config, **arguments)
        driver.synchronize(0)
        return model

    return loaded


@pytest.mark.parametrize("experts", [True, False])
def test_the_model_is_the_same(
    load: Load, folder: Path, experts: bool, begun: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.INFO)
    found = state(load(folder, experts=experts))
    assert begun
    assert LOST not in caplog.text
    monkeypatch.setattr(first_tensors, "guess_requests", lambda *_: guesses.Guessed([], None))
    assert found == state(load(folder, experts=experts))
    assert len(begun) == 1


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [(second, first, last) for first, second, last in guesses._FAMILIES]
    monkeypatch.setattr(guesses, "_FAMILIES", families)


def other_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Guess", lambda are_int8, *others: guesses.Guess(not are_int8, *others))


def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(*_: Any) -> Pour:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(head_start, "Pour", taken)


@pytest.mark.parametrize("spoil", [other_order, other_experts, no_memory])
def test_a_wrong_guess_costs_time_and_nothing_else(
    load: Load, folder: Path, spoil: Callable[[pytest.MonkeyPatch], None], caplog: Any
) -> None:
    expected = state(load(folder, experts=True))
    caplog.set_level(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch)
        assert state(load(folder, experts=True)) == expected
    assert LOST in caplog.text


@pytest.mark.parametrize("has_threads", [True, False])
def test_without_room_or_threads_it_is_as_before(
    load: Load, folder: Path, has_threads: bool, begun: list[int], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    expected = state(load(folder, experts=True))
    caplog.set_level(logging.INFO)
    asked: list[int] = []
    ask = HeadStart._ask_for

    def asking(self: HeadStart, lane: Lane, entries: Any) -> bool:
        asked.append(len(entries))
        return ask(self, lane, entries)

    monkeypatch.setattr(HeadStart, "_ask_for", asking)
    if has_threads:
        monkeypatch.setattr(head_start, "_has_room", lambda part: part.guess is None)
    else:
        monkeypatch.setattr(HeadStart, "_start", lambda *_: False)
    assert state(load(folder, experts=True)) == expected
    assert len(begun) == 1
    assert (asked != []) == has_threads
    assert LOST not in caplog.text


def test_modules_that_are_skipped_are_as_they_were(load: Load, folder: Path, begun: list[int], caplog: Any) -> None:
    """The guess is wrong there, of one layer, or of all."""
    caplog.set_level(logging.INFO)
    some = load(folder, experts=True, skip_modules=["model.layers.0.mlp.experts"])
    assert begun
    assert LOST in caplog.text
    kinds = [type(layer.mlp.experts).__name__ for layer in some.model.layers]
    assert [kind.startswith("Int8") for kind in kinds] == [False] + [True] * (len(kinds) - 1)


def test_a_load_that_fails_before_its_plan_gives_all_back(
    load: Load, folder: Path, begun: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's fixture sees it."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no plan")

    monkeypatch.setattr("pyint8.models.transformers.planned.plan_load", fail)
    with pytest.raises(RuntimeError, match="no plan"):
        load(folder, experts=True)
    assert begun
