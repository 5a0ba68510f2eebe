"""The fake driver of tests/cpp, whose device memory is the host's, for tests of the extension's CUDA road.

PYINT8_TEST_LIBCUDA is the path of libfakecuda.so. Without it these tests are skipped, or fail where
PYINT8_REQUIRE_FAKE_CUDA=1 promises it.
"""

import ctypes
import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from pyint8 import StreamOptions, _core
from pyint8.streaming.lane import Lane, open_lane

COUNTERS = (
    "contexts",
    "streams",
    "events",
    "modules",
    "registered_bytes",
    "device_bytes",
    "peer_accesses",
    "pageable_copies",
    "violations",
)
HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class FakeDriver:
    """The fake's controls (tests/cpp/support/fake_cuda.h), and what torch would do beside us."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._library = ctypes.CDLL(path)
        self._kept: list[object] = []  # what the driver may still call

    @property
    def quantizer(self) -> int:
        """The address of what stands for bitsandbytes' entry point: row-wise absmax on the stream."""
        address = ctypes.cast(self._library.cint8_vector_quant, ctypes.c_void_p).value
        assert address is not None
        return address

    def lane(self, engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
        """A lane opener (see `pyint8.streaming.lane.open_lane`) for GPUs whose memory torch takes for the host's."""
        if device.type != "cuda":
            return open_lane(engine, device, options)
        number = engine.add_cuda_device(device.index or 0, library=self.path)
        return Lane(torch.device("cpu"), number, 0, options.device_scratch, on_gpu=True)

    def reset(self) -> None:
        self._library.fake_cuda_reset()

    def fail(self, entry_point: str, call: int, result: int) -> None:
        self._library.fake_cuda_fail_after(entry_point.encode(), call, result)

    def counters(self) -> dict[str, int]:
        values = (ctypes.c_int64 * len(COUNTERS))()
        self._library.fake_cuda_counters(values)
        return dict(zip(COUNTERS, values, strict=True))

    def synchronize(self, ordinal: int) -> None:
        """Waits until all is done that was put on the default stream, which lanes take for the caller's."""
        context = ctypes.c_void_p()
        calls = [
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal),
            self._library.cuCtxPushCurrent_v2(context),
            self._library.cuStreamSynchronize(None),
            self._library.cuCtxPopCurrent_v2(ctypes.byref(context)),
            self._library.cuDevicePrimaryCtxRelease_v2(ordinal),
        ]
        assert calls == [0] * 5

    def hold_default_stream(self, ordinal: int) -> threading.Event:
        """Stops the default stream until the event that is returned is set."""
        released = threading.Event()
        hold = HOST_FUNCTION(lambda _: released.wait(60))
        self._kept.append(hold)
        context = ctypes.c_void_p()
        calls = [
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal),
            self._library.cuCtxPushCurrent_v2(context),
            self._library.cuLaunchHostFunc(None, hold, None),
            self._library.cuCtxPopCurrent_v2(ctypes.byref(context)),
            self._library.cuDevicePrimaryCtxRelease_v2(ordinal),
        ]
        assert calls == [0] * 5
        return released


@pytest.fixture
def driver() -> Iterator[FakeDriver]:
    """Fails the test if it leaves anything on a device or does what a GPU would not forgive."""
    path = os.environ.get("PYINT8_TEST_LIBCUDA")
    if path is None:
        assert os.environ.get("PYINT8_REQUIRE_FAKE_CUDA") != "1", "PYINT8_TEST_LIBCUDA is not set"
        pytest.skip("PYINT8_TEST_LIBCUDA is not set")
    driver = FakeDriver(path)
    driver.reset()
    yield driver
    gc.collect()
    left = {name: count for name, count in driver.counters().items() if count}
    driver.reset()
    assert left == {}
    assert _core.pinned_bytes_in_use() == 0
