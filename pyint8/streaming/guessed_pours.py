"""What becomes of guessed requests on each GPU, before there is a plan."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from pyint8.errors import DeviceError
from pyint8.report import Recorder
from pyint8.streaming.extension import _core
from pyint8.streaming.guesses import Guessed, are_right
from pyint8.streaming.made import first_parts
from pyint8.streaming.pour import Pour
from pyint8.streaming.pours import can_pour

if TYPE_CHECKING:
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.requests import TensorRequest
    from pyint8.streaming.transport import Transport

# So many requests, which are like each other, are begun before the model is built beside the others.
_FIRST_ASKED = 2048
# Of a lane's scratch: what is not guessed is little.
_EIGHTHS = 6


class GuessedPours:
    """A `Pour` for each GPU.

    Args:
        transport: What moves the bytes; it is closed before this is.

    Attributes:
        by_device: Those that there are.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._has_failed = False
        self.by_device: dict[torch.device, Pour] = {}

    def open(self, lane: Lane, guessed: Guessed) -> bool:
        """Takes memory for what comes of requests; False where nothing will come of them."""
        requests, quantizer = guessed
        firsts = first_parts(requests)
        if not requests or not _core.has_kernels() or not all(can_pour(request, lane, quantizer) for request in firsts):
            return False
        scratch_bytes = lane.scratch_bytes // 8 * _EIGHTHS
        try:
            pour = Pour(self._transport, lane, requests, quantizer or 0, scratch_bytes, {}, Recorder())
        except (DeviceError, torch.OutOfMemoryError):  # no kernels for this GPU; the load itself says it
            return False
        self.by_device[lane.device] = pour
        lane.leave_scratch(scratch_bytes)
        with self._noting_failure():
            pour.allocate()
        return True

    def ask(self, begun: threading.Event) -> None:
        """Asks for everything, of all GPUs by turns; sets `begun` once there is enough to do for a while."""
        at_once = _FIRST_ASKED // max(1, len(self.by_device))
        most = max((len(pour.requests) for pour in self.by_device.values()), default=0)
        for count in range(at_once, most + at_once, at_once):
            for pour in self.by_device.values():
                if self._has_failed:
                    return
                with self._noting_failure():
                    pour.ask(min(count, len(pour.requests)))
            begun.set()

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """What cannot be done is left to the load itself, which may get by with less at a time."""
        try:
            yield
        except (DeviceError, torch.OutOfMemoryError):
            self._has_failed = True

    def are_right(self, wanted: Iterable[TensorRequest]) -> bool:
        """Whether all of it is what a plan asks for."""
        requests = list(itertools.chain.from_iterable(pour.requests for pour in self.by_device.values()))
        return not self._has_failed and (not requests or are_right(requests, wanted))

    def close(self) -> None:
        """Gives back what nobody took."""
        for pour in self.by_device.values():
            pour.close()
        self.by_device.clear()
