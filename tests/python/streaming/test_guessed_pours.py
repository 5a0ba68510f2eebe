"""Guessed requests of several GPUs, begun by a head start, over the fake driver."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver
from pours import GPU, OPTIONS, checkpoint_of, pour, random_weight

from pyint8 import StreamOptions, _core
from pyint8.checkpoint import Checkpoint, Entry
from pyint8.errors import DeviceError
from pyint8.streaming import guessed_pours
from pyint8.streaming import head_start as head_start_module
from pyint8.streaming.guesses import Guess, Guessed, guess_requests
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Made
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")

ONE, OTHER = torch.device("cpu"), torch.device("cpu", 0)  # what torch calls two GPUs of the fake's
SHAPES = {"w1": (30, 70), "w3": (30, 70), "w2": (70, 30)}


@pytest.fixture
def experts(tmp_path: Path) -> Checkpoint:
    names = [f"{layer}.experts.{number}.{name}" for layer in range(3) for number in range(9) for name in SHAPES]
    weights = {
        f"{name}.weight": random_weight(*SHAPES[name[-2:]], torch.bfloat16, seed) for seed, name in enumerate(names)
    }
    return checkpoint_of(tmp_path, weights)


def requests_of(experts: Checkpoint, layer: int, device: torch.device, quantizer: int) -> list[TensorRequest]:
    entries = [entry for name, entry in experts.items() if name.startswith(str(layer))]
    return guess_requests(entries, device, Guess(are_int8=True, quantizer=quantizer)).requests


def head_start(driver: FakeDriver, experts: Checkpoint) -> HeadStart:
    """Of the first layer on one GPU, and the second on the other."""

    def opener(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        lane = driver.lane(engine, torch.device("cuda", int(device == OTHER)), options)
        lane.device = device
        return lane

    start = HeadStart([ONE, OTHER], OPTIONS, gpus=2, opener=opener)
    guess = Guess(are_int8=True, quantizer=driver.quantizer)
    start.begin(
        [
            FirstTensors(device, guess=partial(guess_requests, list(experts.values())[27 * at :][:27], device, guess))
            for at, device in enumerate([ONE, OTHER])
        ]
    )
    return start


def same(one: Made | None, other: Made | None) -> bool:
    assert one is not None and other is not None  # noqa: PT018
    assert one.scales is not None and other.scales is not None  # noqa: PT018
    return torch.equal(one.tensor, other.tensor) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("first_asked", [2, 40, 2048])
def test_each_gpu_makes_its_own(
    driver: FakeDriver, experts: Checkpoint, first_asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guessed_pours, "_FIRST_ASKED", first_asked)
    wanted = {
        device: requests_of(experts, layer, device, driver.quantizer) for layer, device in enumerate([ONE, OTHER])
    }
    transport, early, begun = head_start(driver, experts).take([r for each in wanted.values() for r in each])
    assert set(begun) == {ONE, OTHER}
    assert early == {}
    streams = {
        device: TensorStream(each, transport, early={}, begun=begun[device], quantizer=driver.quantizer)
        for device, each in wanted.items()
    }
    for device, each in wanted.items():
        made = {request.entry.name: streams[device].made(request.entry.name) for request in each}
        streams[device].finish()
        driver.synchronize(int(device == OTHER))
        alone = pour(driver, [request._replace(device=GPU) for request in each])
        assert all(same(made[name], alone[name]) for name in alone)
    transport.close()
    for stream in streams.values():
        stream.close()


def test_a_guess_that_is_wrong_of_one_gpu_is_wrong(driver: FakeDriver, experts: Checkpoint) -> None:
    right = requests_of(experts, 0, ONE, driver.quantizer)
    start = head_start(driver, experts)
    while start._transport.stats()["bytes_read"] < 1:
        time.sleep(0.001)
    first = start._transport
    transport, early, begun = start.take(right)
    assert (early, dict(begun)) == ({}, {})
    assert transport is not first
    assert transport.stats() == first.stats()  # of a load are all bytes that it read, in vain as well
    transport.close()


def test_what_nobody_takes_is_given_back(driver: FakeDriver, experts: Checkpoint) -> None:
    head_start(driver, experts).close()


def test_the_caller_goes_on_once_there_is_enough_to_do(
    driver: FakeDriver, experts: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guessed_pours, "_FIRST_ASKED", 20)
    asked: list[tuple[int, bool]] = []
    ask = guessed_pours.Pour.ask

    begun = threading.Event()

    def asking(self: guessed_pours.Pour, count: int) -> None:
        asked.append((count, begun.is_set()))
        ask(self, count)

    start = head_start(driver, experts)
    start._join()
    monkeypatch.setattr(guessed_pours.Pour, "ask", asking)
    start._guessed.ask(begun)
    assert asked == [(10, False), (10, False), (20, True), (20, True), (27, True), (27, True)]
    start.close()


@pytest.mark.parametrize("has_room", [True, False])
def test_the_caller_does_not_wait_where_nothing_is_guessed(
    driver: FakeDriver, experts: Checkpoint, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    ask, waited = HeadStart._ask_for, []

    def asking(self: HeadStart, lane: Lane, entries: Sequence[Entry]) -> bool:
        if entries:
            waited.append(released.wait(60))
        return ask(self, lane, entries)

    def opener(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        return driver.lane(engine, GPU, options)

    monkeypatch.setattr(HeadStart, "_ask_for", asking)
    monkeypatch.setattr(head_start_module, "_WORTHWHILE_BYTES", 1)
    monkeypatch.setattr(head_start_module, "_has_room", lambda part, _: has_room or part.guess is None)
    start = HeadStart([ONE], OPTIONS, opener=opener)
    start._has_context = True
    other = FirstTensors(ONE, list(experts.values()), 1 << 30)
    start.begin([FirstTensors(ONE, guess=lambda: Guessed([], None), otherwise=lambda: other)])
    released.set()
    transport, early, begun = start.take()
    assert all(waited)
    assert (set(early), dict(begun)) == (set(experts), {})
    transport.close()


@pytest.mark.parametrize("has_begun", [True, False])
def test_ctrl_c_while_a_thread_starts(
    driver: FakeDriver, experts: Checkpoint, has_begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody may leave before those that run have ended."""
    released, is_at_work, done = threading.Event(), threading.Event(), []
    start = head_start(driver, experts)

    def work() -> None:
        is_at_work.set()
        done.append(released.wait(60))

    start._start(work)
    is_at_work.wait(60)
    begin = threading.Thread.start

    def interrupted(self: threading.Thread) -> None:
        if has_begun:
            begin(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start._start(lambda: done.append(False))
    threading.Timer(0.2, released.set).start()
    start.close()
    assert done == [True]  # what had not begun does not any more
    assert not [thread for thread in threading.enumerate() if thread.name == "pyint8 head start"]


def test_scratch_is_left_to_guessed_requests(
    driver: FakeDriver, experts: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = HeadStart([ONE], OPTIONS, opener=lambda engine, _, options: driver.lane(engine, GPU, options))
    transport = start.take().transport
    lane = transport.lane(ONE)
    guessed = Guessed(requests_of(experts, 0, ONE, driver.quantizer), driver.quantizer)
    pours = guessed_pours.GuessedPours(transport)

    def refused(*_: object) -> _core.Consumer:
        raise DeviceError("no kernels for this GPU")

    with monkeypatch.context() as patch:
        patch.setattr(Transport, "make_consumer", refused)
        assert not pours.open(lane, guessed)
    with monkeypatch.context() as patch:
        patch.setattr(_core, "has_kernels", lambda: False)
        assert not pours.open(lane, guessed)
    assert lane.scratch_bytes == OPTIONS.device_scratch
    assert not transport._in_use
    assert pours.open(lane, guessed)
    assert lane.scratch_bytes == OPTIONS.device_scratch // 4
    assert sum(memory.nbytes for memory in transport._in_use.values()) >= OPTIONS.device_scratch // 4 * 3
    transport.close()
    pours.close()


def test_a_pour_that_cannot_begin_is_given_back_at_once(
    driver: FakeDriver, experts: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Pour]] = []

    def failing(self: Pour, _: int) -> None:
        made.append(weakref.ref(self))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Pour, "_written_down", failing)
    requests = [request._replace(device=GPU) for request in requests_of(experts, 0, ONE, driver.quantizer)]
    gc.collect()
    gc.disable()
    with suppress(torch.OutOfMemoryError):
        pour(driver, requests)
    gc.enable()
    assert [each() for each in made] == [None]
