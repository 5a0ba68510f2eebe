"""What the extension reads through Python functions: bytes, errors, cancelling, and whose lock is held."""

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pyint8 import _core
from pyint8.errors import CancelledError, OptionError, RemoteError


@pytest.fixture
def content() -> bytes:
    return bytes(torch.randint(0, 256, (300_001,), dtype=torch.uint8).numpy())


@pytest.fixture
def engine() -> Iterator[_core.Engine]:
    engine = _core.Engine(threads=3, slots_per_thread=1, slot_bytes=20480, direct_io=False)
    engine.add_host_device(threads=1)
    yield engine
    engine.close()


def in_chunks(content: bytes, nbytes: int) -> Callable[[int, int], Iterator[Any]]:
    def ranges(offset: int, wanted: int) -> Iterator[Any]:
        for at in range(offset, offset + wanted, nbytes):
            yield memoryview(content)[at : min(at + nbytes, offset + wanted)]

    return ranges


def read(engine: _core.Engine, ranges: Callable[[int, int], Any], offset: int, nbytes: int) -> torch.Tensor:
    memory = torch.zeros(nbytes, dtype=torch.uint8)
    file = engine.add_source(ranges, lambda: None)
    engine.wait(engine.submit(0, [(file, offset, nbytes, memory.data_ptr())], 0, first=False), 0)
    return memory


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("nbytes", [1000, 4096, 1 << 20])
def test_chunks_of_any_size_come_together(engine: _core.Engine, content: bytes, nbytes: int) -> None:
    memory = read(engine, in_chunks(content, nbytes), 77, 250_000)
    assert bytes(memory.numpy()) == content[77:250_077]
    engine.close()


def test_lists_of_bytes_do_too(engine: _core.Engine, content: bytes) -> None:
    memory = read(engine, lambda offset, nbytes: [content[offset : offset + nbytes], b""], 5, 1000)
    assert bytes(memory.numpy()) == content[5:1005]


@pytest.mark.parametrize("gives", [b"", b"x" * 99, b"x" * 101])
def test_another_number_of_bytes_than_asked_for_is_an_error(engine: _core.Engine, gives: bytes) -> None:
    with pytest.raises(OptionError, match="asked for 100 bytes gave"):
        read(engine, lambda offset, nbytes: [gives], 0, 100)


def test_what_is_no_buffer_is_an_error(engine: _core.Engine) -> None:
    with pytest.raises(TypeError, match="bytes-like"):
        read(engine, lambda offset, nbytes: [17], 0, 100)


def test_all_who_wait_get_the_exception_each_a_copy(engine: _core.Engine) -> None:
    """The engine keeps the first, and must not keep, by its traceback, whoever waits and has the engine."""
    error = RemoteError("no", path="s3://bucket/shard", offset=12)

    def ranges(offset: int, nbytes: int) -> Any:
        raise error from KeyError("why")

    memory = torch.zeros(100, dtype=torch.uint8)
    file = engine.add_source(ranges, lambda: None)
    first = engine.submit(0, [(file, at, 10, memory.data_ptr() + at) for at in range(0, 100, 10)], 0, first=False)
    for ticket in range(first, first + 10):
        with pytest.raises(RemoteError, match=r"s3://bucket/shard, byte 12: no") as caught:
            engine.wait(ticket, 0)
        assert caught.value is not error
        assert caught.value.__cause__ is error.__cause__
        assert isinstance(error.__cause__, KeyError)
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    assert not any(name.startswith("test_") for name in frames)


@pytest.mark.usefixtures("nothing_left")
def test_closing_cancels(engine: _core.Engine) -> None:
    begun, stop = threading.Event(), threading.Event()

    def ranges(offset: int, nbytes: int) -> Any:
        begun.set()
        assert stop.wait(20)
        raise CancelledError("stopped")

    memory = torch.zeros(100, dtype=torch.uint8)
    file = engine.add_source(ranges, stop.set)
    ticket = engine.submit(0, [(file, 0, 100, memory.data_ptr())], 0, first=False)
    assert begun.wait(20)
    engine.close()
    with pytest.raises(CancelledError):
        engine.wait(ticket, 0)


def test_cancelling_that_fails_ends_nothing(engine: _core.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", told.append)
    engine.add_source(lambda offset, nbytes: [], lambda: 1 / 0)
    engine.close()
    assert isinstance(told[0].exc_value, ZeroDivisionError)


def test_ctrl_c_in_the_midst_of_cancelling_is_raised_once_all_is_closed(engine: _core.Engine) -> None:
    calls = []

    def cancel() -> None:
        calls.append("cancelled")
        if len(calls) == 1:
            raise KeyboardInterrupt

    def close() -> None:
        engine.close()
        time.sleep(1)  # at the latest here

    engine.add_source(lambda offset, nbytes: [], cancel)
    with pytest.raises(KeyboardInterrupt):
        close()
    assert len(calls) == 2


def test_others_run_while_a_source_waits(engine: _core.Engine) -> None:
    def ranges(offset: int, nbytes: int) -> Any:
        time.sleep(0.3)
        return [bytes(nbytes)]

    ticks = 0
    memory = torch.ones(100, dtype=torch.uint8)
    file = engine.add_source(ranges, lambda: None)
    ticket = engine.submit(0, [(file, 0, 100, memory.data_ptr())], 0, first=False)
    waiter = threading.Thread(target=engine.wait, args=[ticket, 0])
    waiter.start()
    while waiter.is_alive():
        ticks += 1
        time.sleep(0.01)
    assert ticks > 10
    assert not memory.any()


def in_thread(task: Callable[[], object]) -> None:
    threading.Thread(target=task).start()


@pytest.mark.parametrize("nbytes", [1000, 1 << 20])
def test_ranges_may_be_read_by_other_threads(engine: _core.Engine, content: bytes, nbytes: int) -> None:
    memory = torch.zeros(250_000, dtype=torch.uint8)
    file = engine.add_source(in_chunks(content, nbytes), lambda: None, in_thread)
    engine.wait(engine.submit(0, [(file, 77, 250_000, memory.data_ptr())], 0, first=False), 0)
    assert bytes(memory.numpy()) == content[77:250_077]


@pytest.mark.parametrize("gives", [b"", b"x" * 99, b"x" * 101])
def test_another_number_of_bytes_is_an_error_there_too(engine: _core.Engine, gives: bytes) -> None:
    memory = torch.zeros(100, dtype=torch.uint8)
    file = engine.add_source(lambda offset, nbytes: [gives], lambda: None, in_thread)
    ticket = engine.submit(0, [(file, 0, 100, memory.data_ptr())], 0, first=False)
    with pytest.raises(OptionError, match="asked for 100 bytes gave"):
        engine.wait(ticket, 0)


def test_what_another_thread_raises_is_the_waiters_error(engine: _core.Engine) -> None:
    error = RemoteError("no", path="s3://bucket/shard", offset=12)

    def ranges(offset: int, nbytes: int) -> Any:
        raise error

    memory = torch.zeros(100, dtype=torch.uint8)
    file = engine.add_source(ranges, lambda: None, in_thread)
    ticket = engine.submit(0, [(file, 0, 100, memory.data_ptr())], 0, first=False)
    with pytest.raises(RemoteError) as caught:
        engine.wait(ticket, 0)
    assert (str(caught.value), caught.value.path, caught.value.offset) == (str(error), error.path, error.offset)


@pytest.mark.usefixtures("nothing_left")
def test_a_close_waits_for_no_other_thread_and_nothing_is_written_after_it(engine: _core.Engine) -> None:
    begun, go_on, has_ended = threading.Event(), threading.Event(), threading.Event()

    def ranges(offset: int, nbytes: int) -> Iterator[bytes]:
        yield b"x" * 10
        begun.set()
        assert go_on.wait(20)
        try:
            yield b"x" * (nbytes - 10)
        finally:
            has_ended.set()

    memory = torch.zeros(1000, dtype=torch.uint8)
    file = engine.add_source(ranges, lambda: None, in_thread)
    ticket = engine.submit(0, [(file, 0, 1000, memory.data_ptr())], 0, first=False)
    assert begun.wait(20)
    started = time.monotonic()
    engine.close()
    assert time.monotonic() - started < 1
    with pytest.raises(CancelledError):
        engine.wait(ticket, 0)
    go_on.set()
    assert has_ended.wait(20)
    assert bytes(memory[10:].numpy()) == bytes(990)
