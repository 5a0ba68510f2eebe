"""The extension through its binding: bytes, errors, Ctrl-C and the GIL; how it transposes is in test_core_transpose.py,
its CUDA road in test_core_cuda.py."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pyint8 import _core
from pyint8.errors import CancelledError, DeviceError, OptionError, Pyint8Error, ReadError, TruncatedError

MIB = 1 << 20


def make_engine(threads: int = 1, slots_per_thread: int = 2, slot_bytes: int = 8192, direct_io: bool = False):
    return _core.Engine(threads=threads, slots_per_thread=slots_per_thread, slot_bytes=slot_bytes, direct_io=direct_io)


@pytest.fixture(scope="module", autouse=True)
def _first_thread() -> None:
    """ThreadSanitizer adds one of its own beside the process's first, which `nothing_left` would count."""
    thread = threading.Thread(target=time.sleep, args=[0])
    thread.start()
    thread.join()


@pytest.fixture
def engine(path: str) -> Iterator[_core.Engine]:
    """With one host lane and one file."""
    engine = make_engine()
    engine.add_host_device(threads=1)
    engine.add_file(path)
    yield engine
    engine.close()


def empty(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


# --- Bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_reads_are_exact(path: str, content: bytes, threads: int, direct_io: bool) -> None:
    engine = make_engine(threads, slot_bytes=20480, direct_io=direct_io)
    lane, file = engine.add_host_device(threads=threads), engine.add_file(path)
    chance = random.Random(threads)
    ranges = []
    for _ in range(300):
        offset = chance.randrange(len(content))
        ranges.append((offset, min(len(content) - offset, chance.choice([0, 1, 77, 4096, 60_000]))))
    tensors = [empty(nbytes) for _, nbytes in ranges]
    reads = [(file, *place, tensor.data_ptr()) for place, tensor in zip(ranges, tensors, strict=True)]
    first = engine.submit(lane, reads[:200], stream=0, first=False)
    second = engine.submit(lane, reads[200:], stream=0, first=True)
    assert (first, second) == (0, 200)
    for ticket, ((offset, nbytes), tensor) in enumerate(zip(ranges, tensors, strict=True)):
        engine.wait(ticket, stream=0)
        assert tensor.numpy().tobytes() == content[offset : offset + nbytes]
    stats = engine.stats()
    assert stats["bytes_read"] == stats["bytes_delivered"] == sum(nbytes for _, nbytes in ranges)
    assert stats["pieces"] > 0
    assert stats["read_seconds"] > 0
    assert stats["slot_seconds"] == 0
    engine.close()


def test_importing_the_extension_imports_nothing_heavy() -> None:
    code = "import sys, pyint8._core; print({'torch', 'numpy', 'transformers', 'bitsandbytes'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- Errors ----------------------------------------------------------------------------------------------------------


def test_an_absent_file(engine: _core.Engine) -> None:
    with pytest.raises(ReadError, match=r"cannot open the file.*: No such file") as caught:
        engine.add_file("/nowhere/model.safetensors")
    assert (caught.value.path, caught.value.offset) == ("/nowhere/model.safetensors", None)
    assert caught.value.errno == errno.ENOENT
    assert isinstance(caught.value, OSError)


def test_a_folder_is_no_file(engine: _core.Engine, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="Is a directory") as caught:
        engine.add_file(str(tmp_path))
    assert (caught.value.path, caught.value.offset, caught.value.errno) == (str(tmp_path), None, errno.EISDIR)


def test_a_truncated_file(engine: _core.Engine, path: str, content: bytes) -> None:
    tensor = empty(100)
    ticket = engine.submit(0, [(0, len(content) - 10, 100, tensor.data_ptr())], stream=0, first=False)
    for _ in range(2):  # what stopped the engine stays what every wait says
        with pytest.raises(TruncatedError, match="the file ends here, 90 bytes before") as caught:
            engine.wait(ticket, stream=0)
        assert (caught.value.path, caught.value.offset) == (path, len(content))


def test_a_path_that_is_not_unicode(engine: _core.Engine, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.bin"
    with pytest.raises(ReadError) as caught:
        engine.add_file(name)
    assert os.fsencode(caught.value.path) == name
    with open(name, "wb") as file:
        file.write(b"123")
    tensor = empty(3)
    read = (engine.add_file(name), 0, 3, tensor.data_ptr())
    engine.wait(engine.submit(0, [read], stream=0, first=False), stream=0)
    assert tensor.numpy().tobytes() == b"123"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threads": 0}, "threads is 0; it must be from 1 to 1024"),
        ({"slots_per_thread": 65}, "slots_per_thread is 65; it must be from 1 to 64"),
        ({"slot_bytes": 9000}, "slot_bytes is 9000; it must be a multiple of 4096"),
    ],
)
def test_a_wrong_option(options: dict[str, int], words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        make_engine(**options)
    assert isinstance(caught.value, ValueError)


def test_numbers_of_nothing(engine: _core.Engine) -> None:
    tensor = empty(8)
    pointer = tensor.data_ptr()
    with pytest.raises(OptionError, match="there is no lane 1"):
        engine.submit(1, [], stream=0, first=False)
    with pytest.raises(OptionError, match="there is no file 1"):
        engine.submit(0, [(1, 0, 8, pointer)], stream=0, first=False)
    with pytest.raises(OptionError, match=r"ends beyond 2\^63"):
        engine.submit(0, [(0, 2**63, 8, pointer)], stream=0, first=False)
    with pytest.raises(OptionError, match="there is no ticket 0"):
        engine.wait(0, stream=0)
    with pytest.raises(OptionError, match="no kernel reads I8; F16, BF16 and F32 are read"):
        engine.transpose_to_half(0, pointer, "I8", False, 1, 1, pointer, 1, 0)
    with pytest.raises(OptionError, match="a destination stride of 1 cannot hold 2 columns"):
        engine.transpose_to_half(0, pointer, "F16", False, 2, 1, pointer, 1, 0)
    for read in [(-1, 0, 8, pointer), (0, -1, 8, pointer), (0, 0, 2**64, pointer), (0, 0, 8), (0, 0, 8.5, pointer)]:
        with pytest.raises(TypeError):
            engine.submit(0, [read], stream=0, first=False)
    ticket = engine.submit(0, [(0, 0, 8, pointer)], stream=0, first=False)
    engine.wait(ticket, stream=0)
    with pytest.raises(OptionError, match="ticket 0 was waited for before"):
        engine.wait(ticket, stream=0)


def test_no_driver(engine: _core.Engine) -> None:
    with pytest.raises(DeviceError, match=r"driver library cannot be opened.*libcuda-of-nobody") as caught:
        engine.add_cuda_device(0, library="libcuda-of-nobody.so.1")
    assert isinstance(caught.value, RuntimeError)


# --- Interruption ----------------------------------------------------------------------------------------------------


def submit_for_minutes(engine: _core.Engine, tmp_path: Path, memory: torch.Tensor) -> int:
    """Work for one worker that does not end by itself; returns its last ticket."""
    sparse = tmp_path / "sparse"
    with open(sparse, "wb") as file:
        file.truncate(len(memory))
    read = (engine.add_file(str(sparse)), 0, len(memory), memory.data_ptr())
    for _ in range(100):
        ticket = engine.submit(0, [read] * 300, stream=0, first=False)
    return ticket + 299


@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_ends_a_wait_and_close_gives_everything_back(tmp_path: Path) -> None:
    memory = empty(64 * MIB)
    engine = make_engine(slot_bytes=64 * MIB)
    engine.add_host_device(threads=1)
    ticket = submit_for_minutes(engine, tmp_path, memory)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.wait(ticket, stream=0)
    assert time.monotonic() - start < 2
    timer.join()
    engine.close()
    engine.close()
    assert time.monotonic() - start < 4
    with pytest.raises(CancelledError, match="the stream was closed"):
        engine.wait(ticket, stream=0)
    with pytest.raises(CancelledError):
        engine.submit(0, [], stream=0, first=False)


@pytest.mark.usefixtures("nothing_left")
def test_the_gil_is_free_while_one_waits_and_close_wakes_the_waiter(tmp_path: Path) -> None:
    memory = empty(64 * MIB)
    engine = make_engine(slot_bytes=64 * MIB)
    engine.add_host_device(threads=1)
    ticket = submit_for_minutes(engine, tmp_path, memory)
    errors: list[Pyint8Error] = []

    def wait() -> None:
        with pytest.raises(CancelledError) as caught:
            engine.wait(ticket, stream=0)
        errors.append(caught.value)

    waiter = threading.Thread(target=wait)
    waiter.start()
    steps, end = 0, time.monotonic() + 0.3
    while time.monotonic() < end:
        steps += 1  # one of 50 ms could be done if the waiter kept the GIL between its looks for a signal
    assert steps > 1000
    engine.close()
    waiter.join(timeout=5)
    assert len(errors) == 1


@pytest.mark.usefixtures("nothing_left")
def test_an_engine_that_is_dropped_closes_itself(tmp_path: Path) -> None:
    memory = empty(MIB)
    engine = make_engine(slot_bytes=MIB, direct_io=True)
    engine.add_host_device(threads=1)
    submit_for_minutes(engine, tmp_path, memory)
    del engine
