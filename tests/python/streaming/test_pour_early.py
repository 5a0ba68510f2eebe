"""What is made of tensors that landed before there was a stream, over the fake driver; and what takes their room.

What is made, and what it is made of, must outlive the stream: the fake's memory is not given back in a stream's order.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from fake_driver import FakeDriver, driver
from pours import GPU, OPTIONS, begun_early, checkpoint_of, quantized, random_weight

from pyint8 import _core
from pyint8.errors import CancelledError
from pyint8.streaming.early import EarlyTensor
from pyint8.streaming.made import Made
from pyint8.streaming.pour import Pour
from pyint8.streaming.pump import Pump
from pyint8.streaming.requests import Part, TensorRequest, ToDtype, ToInt8
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

__all__ = ["driver"]  # a fixture

BegunLoad: TypeAlias = tuple[TensorStream, Transport, dict[str, torch.Tensor]]

pytestmark = pytest.mark.skipif(not _core.has_kernels(), reason="a build without kernels")


@pytest.mark.parametrize("becomes", [ToInt8(torch.bfloat16), ToDtype(torch.float16), ToDtype(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("part", [None, Part("whole", (2, 300, 200), 60000)], ids=["whole", "part"])
def test_what_landed_early_is_made_of_where_it_is(
    driver: FakeDriver, tmp_path: Path, becomes: ToInt8 | ToDtype, part: Part | None
) -> None:
    weight = random_weight(300, 200, torch.bfloat16)
    entries = checkpoint_of(tmp_path, {"weight": weight})
    transport = Transport(OPTIONS, driver.lane)
    lane, entry = transport.lane(GPU), entries["weight"]
    begun = begun_early(transport, lane, entry)
    part = part if isinstance(becomes, ToDtype) else None
    request = TensorRequest(entry, GPU, True, becomes=becomes, part=part)
    stream = TensorStream([request], transport, early={"weight": begun}, quantizer=driver.quantizer)
    if isinstance(becomes, ToDtype) and becomes.dtype == torch.bfloat16 and part is None:
        assert not stream.makes("weight")  # it is there
        found = stream.whole("weight")
    else:
        made = stream.made("weight")
        assert made is not None
        found = made.tensor
    stream.finish()
    transport.close()
    assert transport.stats()["bytes_delivered"] == entry.nbytes  # nothing was read twice
    if isinstance(becomes, ToInt8):
        assert torch.equal(found, quantized(weight.half())[0])
    else:
        assert torch.equal(found if part is None else found[1], weight.to(becomes.dtype))
    stream.close()


def test_what_early_tensors_wait_for_is_read_ahead_of_them(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are served in order: what is in between, read behind all early ones, would hold them all up."""
    names = ["before", "early", "between", "also early", "after", "at last"]
    entries = checkpoint_of(tmp_path, {name: random_weight(30, 20, torch.bfloat16) for name in names})
    transport = Transport(OPTIONS, driver.lane)
    lane, asked = transport.lane(GPU), []
    begun = {name: begun_early(transport, lane, entries[name]) for name in ("early", "also early")}

    def submit(self: Any, requests: list[Any], stream: int, *, first: bool) -> int:
        asked.append((len(requests), first))
        return int(consumer_submit(self, requests, stream, first=first))

    consumer_submit = _core.Consumer.submit
    monkeypatch.setattr(_core.Consumer, "submit", submit)
    becomes = ToInt8(torch.bfloat16)
    requests = [TensorRequest(entries[name], GPU, True, becomes=becomes) for name in names]
    stream = TensorStream(requests, transport, early=dict(begun), quantizer=driver.quantizer)
    stream.finish()
    transport.close()
    stream.close()
    assert [first for count, first in asked for _ in range(count)] == 4 * [True] + 2 * [False]


EARLY = 8  # of 12 weights that become int8


@pytest.fixture
def begun_load(driver: FakeDriver, tmp_path: Path) -> Iterator[Callable[[], BegunLoad]]:
    """Loads most of which is under way: early tensors leave little room for results, so others have to wait."""
    kept: list[EarlyTensor] = []  # the fake's memory is not given back in the order of a stream
    weights = {f"{number:02}": random_weight(90, 70, torch.bfloat16, number) for number in range(12)}
    entries = checkpoint_of(tmp_path, weights)
    requests = [TensorRequest(entry, GPU, True, becomes=ToInt8(torch.bfloat16)) for entry in entries.values()]

    def begin() -> BegunLoad:
        transport = Transport(OPTIONS, driver.lane)
        lane = transport.lane(GPU)
        begun = {name: begun_early(transport, lane, entries[name]) for name in list(weights)[:EARLY]}
        kept.extend(begun.values())
        return TensorStream(requests, transport, early=begun, quantizer=driver.quantizer), transport, weights

    yield begin
    driver.synchronize(0)


def test_the_room_of_early_tensors_is_used_whatever_the_caller_does(begun_load: Callable[[], BegunLoad]) -> None:
    stream, transport, weights = begun_load()
    (pour_of_gpu,) = set(stream._pours.values())
    wait_until(lambda: pour_of_gpu._submitted == len(weights))  # nobody takes anything, nor waits
    check(*taken(stream, transport, weights))
    assert transport.stats()["bytes_delivered"] == sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize("has_threads", [True, False])
def test_an_early_load_whose_caller_comes_at_once(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch, has_threads: bool
) -> None:
    """Whoever of the two, the caller or the thread, comes first to a tensor; and where no thread can be had."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    if not has_threads:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(20):
        check(*taken(*begun_load()))


def test_without_a_thread_the_caller_uses_the_room_when_it_takes_something(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pump, "start", lambda *_: None)
    stream, transport, weights = begun_load()
    (pour_of_gpu,) = set(stream._pours.values())
    first, *others = weights
    made = {first: stream.made(first)}
    before = pour_of_gpu._submitted
    wait_until(lambda: pour_of_gpu._consumer.done() >= before)
    second, *others = others
    made[second] = stream.made(second)
    assert pour_of_gpu._submitted > before
    made |= {name: stream.made(name) for name in others}
    stream.finish()
    transport.close()
    stream.close()
    check(made, weights)


@pytest.fixture
def busy_load(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[BegunLoad, threading.Event]]:
    """Begins a load whose thread has the lock until the event is set."""
    has_lock, go_on, note = threading.Event(), threading.Event(), Pour._note

    def slowly(self: Pour, ready: int) -> None:
        if threading.current_thread() in pump_threads():
            has_lock.set()
            assert go_on.wait(60)
        note(self, ready)

    def begin() -> tuple[BegunLoad, threading.Event]:
        load = begun_load()
        assert has_lock.wait(60)
        return load, go_on

    monkeypatch.setattr(Pour, "_note", slowly)
    return begin


def test_what_was_asked_for_is_taken_though_the_thread_has_the_lock(
    busy_load: Callable[[], tuple[BegunLoad, threading.Event]],
) -> None:
    (stream, transport, weights), go_on = busy_load()
    first, *others = weights
    made = {first: stream.made(first)}
    go_on.set()
    made |= taken(stream, transport, dict.fromkeys(others))[0]
    check(made, weights)


@pytest.mark.parametrize(("room", "ticket"), [(1, 0), (3, 2), (100, 3)])
def test_more_is_asked_for_once_there_is_room(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch, room: int, ticket: int
) -> None:
    """Of so many early tensors; or of half of what was asked for, which is the eight of them."""
    monkeypatch.setattr(Pump, "start", lambda *_: None)
    stream, transport, weights = begun_load()
    (pour_of_gpu,) = set(stream._pours.values())
    monkeypatch.setattr("pyint8.streaming.pour._ROOM_BYTES", room * weights["00"].nbytes)
    with monkeypatch.context() as all_early_ones:
        all_early_ones.setattr(pour_of_gpu, "_submitted", EARLY)
        assert pour_of_gpu._making_room() == ticket
    check(*taken(stream, transport, weights))


def test_a_forked_child_is_told_though_the_thread_had_the_lock(
    busy_load: Callable[[], tuple[BegunLoad, threading.Event]],
) -> None:
    (stream, transport, weights), go_on = busy_load()
    child = os.fork()
    if child == 0:
        try:
            stream.made(next(iter(weights)))
        except CancelledError:
            os._exit(7)
        finally:
            os._exit(1)
    ended: list[int] = []
    wait_until(lambda: bool(ended) or has_ended(child, ended))
    go_on.set()
    assert ended == [7]
    check(*taken(stream, transport, weights))


def has_ended(child: int, ended: list[int]) -> bool:
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
        ended.append(os.waitstatus_to_exitcode(status))
    return bool(found)


def test_the_thread_makes_what_the_caller_would(begun_load: Callable[[], BegunLoad]) -> None:
    with torch.inference_mode():
        stream, transport, weights = begun_load()
        wait_until(lambda: not pump_threads())
        made, _ = taken(stream, transport, weights)
    assert all(one is not None and one.tensor.is_inference() for one in made.values())


def test_what_was_half_written_down_is_not_written_down_again(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the thread, nor by a caller that goes on."""
    monkeypatch.setattr(Pump, "start", lambda *_: None)
    stream, transport, weights = begun_load()
    (pour_of_gpu,) = set(stream._pours.values())
    written_down, asked = Pour._written_down, []

    def interrupted(self: Pour, ticket: int) -> Any:
        asked.append(ticket)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return written_down(self, ticket)

    monkeypatch.setattr(Pour, "_written_down", interrupted)
    last = list(weights)[-1]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stream.made(last)
    with pytest.raises(KeyboardInterrupt):
        pour_of_gpu._note(pour_of_gpu._ready + 1)
    assert len(asked) == 2
    transport.close()
    stream.close()


def wait_until(happens: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < until
        time.sleep(0.001)


def taken(
    stream: TensorStream, transport: Transport, weights: Mapping[str, torch.Tensor | None]
) -> tuple[dict[str, Made | None], Mapping[str, Any]]:
    made = {name: stream.made(name) for name in weights}
    stream.finish()
    transport.close()
    stream.close()
    assert not pump_threads()
    return made, weights


def check(made: dict[str, Made | None], weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        found = made[name]
        assert found is not None
        assert torch.equal(found.tensor, quantized(weight.half())[0])


def test_what_stops_the_thread_is_the_callers_error(
    begun_load: Callable[[], BegunLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, main = Pour._submit, threading.current_thread()

    def full(self: Pour, end: int) -> None:
        if threading.current_thread() is not main:
            raise torch.OutOfMemoryError
        submit(self, end)

    monkeypatch.setattr(Pour, "_submit", full)
    stream, transport, weights = begun_load()
    for thread in pump_threads():
        thread.join(60)
    with pytest.raises(torch.OutOfMemoryError):
        list(map(stream.made, weights))
    transport.close()
    stream.close()


def test_a_load_that_is_closed_halfway_leaves_no_thread(begun_load: Callable[[], BegunLoad]) -> None:
    for _ in range(20):
        stream, transport, _ = begun_load()
        transport.close()
        stream.close()
        assert not pump_threads()


def pump_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("pyint8 pump")]
