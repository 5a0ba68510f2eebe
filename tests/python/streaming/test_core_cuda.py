"""The extension's CUDA road through its binding, over the fake driver (see tests/support/fake_driver.py)."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_driver import FakeDriver, driver

from pyint8 import _core
from pyint8.errors import DeviceError, TruncatedError

__all__ = ["driver"]  # a fixture

SLOT = 8192


def make_engine(driver: FakeDriver, path: str, lanes: int = 1, **options: int) -> _core.Engine:
    """Lane i is device i; file 0 is `path`."""
    defaults = {"threads": 2, "slots_per_thread": 2, "slot_bytes": SLOT, "direct_io": False}
    engine = _core.Engine(**{**defaults, **options})
    for ordinal in range(lanes):
        assert engine.add_cuda_device(ordinal, library=driver.path) == ordinal
    engine.add_file(path)
    return engine


def empty(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("lanes", [1, 3])
def test_reads_are_exact(driver: FakeDriver, path: str, content: bytes, lanes: int, direct_io: bool) -> None:
    engine = make_engine(driver, path, lanes, direct_io=direct_io)
    chance = random.Random(lanes)
    tensors = []
    for _ in range(100):
        offset = chance.randrange(len(content))
        nbytes = min(len(content) - offset, chance.choice([0, 1, 77, 4096, 30_000]))
        tensor, lane = empty(nbytes), chance.randrange(lanes)
        ticket = engine.submit(lane, [(0, offset, nbytes, tensor.data_ptr())], stream=0, first=chance.random() < 0.5)
        tensors.append((ticket, tensor, content[offset : offset + nbytes]))
    assert _core.pinned_bytes_in_use() == 4 * SLOT
    for ticket, _, _ in tensors:
        engine.wait(ticket, stream=0)
    engine.close()  # in place of a synchronization: copies are over
    assert all(tensor.numpy().tobytes() == expected for _, tensor, expected in tensors)
    assert _core.pinned_bytes_in_use() == 0


@pytest.mark.skipif(not _core.has_kernels(), reason="this build has no kernels")
def test_a_weight_is_transposed_where_it_landed(driver: FakeDriver, tmp_path: Path) -> None:
    weight = torch.randn(100, 60, generator=torch.Generator().manual_seed(0)).bfloat16()
    file = tmp_path / "weight"
    file.write_bytes(weight.view(torch.uint8).numpy().tobytes())
    engine = make_engine(driver, str(file))
    scratch, target = torch.empty_like(weight), torch.zeros(60, 100, dtype=torch.float16)
    read = (0, 0, weight.nbytes, scratch.data_ptr())
    engine.wait(engine.submit(0, [read], stream=0, first=False), stream=0)
    engine.transpose_to_half(0, scratch.data_ptr(), "BF16", True, 100, 60, target.data_ptr(), 100, stream=0)
    done = empty(1)  # the driver copies it behind the transposition, as its destination is asked for on the same stream
    engine.submit(0, [(0, 0, 1, done.data_ptr())], stream=0, first=False)
    engine.wait(1, stream=0)
    engine.close()
    assert torch.equal(target, weight.half().T)


def test_a_destination_still_in_use_is_not_written(driver: FakeDriver, path: str, content: bytes) -> None:
    tensor = torch.zeros(3 * SLOT, dtype=torch.uint8)
    engine = make_engine(driver, path)
    in_use = driver.hold_default_stream(0)
    engine.wait(engine.submit(0, [(0, 0, len(tensor), tensor.data_ptr())], stream=0, first=False), stream=0)
    time.sleep(0.05)
    assert not tensor.any()
    in_use.set()
    engine.close()
    assert tensor.numpy().tobytes() == content[: len(tensor)]


def test_ctrl_c_while_the_bus_is_stuck(driver: FakeDriver, path: str, content: bytes) -> None:
    tensor = empty(100_000)
    engine = make_engine(driver, path)
    stuck = driver.hold_default_stream(0)
    ticket = engine.submit(0, [(0, 0, len(tensor), tensor.data_ptr())], stream=0, first=False)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        engine.wait(ticket, stream=0)  # all slots are full and none is emptied
    assert time.monotonic() - start < 2
    timer.join()
    threading.Timer(0.2, stuck.set).start()
    engine.close()  # waits for the copies under way: neither slots nor destinations may go before


def test_errors_of_a_worker_and_of_the_driver(driver: FakeDriver, path: str, content: bytes) -> None:
    tensor = empty(100)
    engine = make_engine(driver, path)
    ticket = engine.submit(0, [(0, len(content) - 1, 100, tensor.data_ptr())], stream=0, first=False)
    with pytest.raises(TruncatedError) as caught:
        engine.wait(ticket, stream=0)
    assert (caught.value.path, caught.value.offset) == (path, len(content))

    engine = make_engine(driver, path)
    driver.fail("cuMemcpyHtoDAsync_v2", 1, 719)
    ticket = engine.submit(0, [(0, 0, 100, tensor.data_ptr())], stream=0, first=False)
    with pytest.raises(DeviceError, match="cuMemcpyHtoDAsync: CUDA_ERROR_LAUNCH_FAILED"):
        engine.wait(ticket, stream=0)

    driver.fail("cuMemHostRegister_v2", 1, 2)
    with pytest.raises(DeviceError, match=r"ulimit -l.*CUDA_ERROR_OUT_OF_MEMORY"):
        make_engine(driver, path).submit(0, [(0, 0, 100, tensor.data_ptr())], stream=0, first=False)
    with pytest.raises(DeviceError, match="cuDeviceGet: CUDA_ERROR_INVALID_DEVICE"):
        make_engine(driver, path, lanes=5)


def test_a_machine_whose_driver_has_no_device(driver: FakeDriver) -> None:
    code = f"""
from pyint8 import _core
engine = _core.Engine(threads=1, slots_per_thread=1, slot_bytes={SLOT}, direct_io=False)
engine.add_cuda_device(0, library={driver.path!r})
"""
    environment = {**os.environ, "FAKE_CUDA_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert "pyint8.errors.DeviceError: cuInit: CUDA_ERROR_NO_DEVICE" in done.stderr
