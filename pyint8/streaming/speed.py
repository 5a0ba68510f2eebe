"""How fast bytes reach a device here: by the bus alone, and through the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.transport import ReadRequest, Transport

if TYPE_CHECKING:
    from pyint8.config import StreamOptions

_GB = 1e9
_READ = 32 << 20  # about a weight
_COPY = 256 << 20
_PASSES = 4


def bus_speed(gpu: int) -> float:
    """GB/s of a copy from pinned memory to a GPU, the best of a few."""
    device = torch.device("cuda", gpu)
    source = torch.empty(_COPY, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY, dtype=torch.uint8, device=device)

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)

    return _COPY / min(_seconds(copy) for _ in range(_PASSES)) / _GB


def engine_speed(path: str, nbytes: int, device: torch.device, options: StreamOptions) -> float:
    """GB/s of the engine from a file into memory of a device, the best of a few: out of the page cache, then.

    Raises:
        Pyint8Error: The file cannot be read, or the driver refuses.
    """
    with closing(Transport(options)) as transport:
        lane = transport.lane(device)
        memory = torch.empty(nbytes, dtype=torch.uint8, device=lane.device)
        reads = [
            ReadRequest(path, offset, min(_READ, nbytes - offset), memory, offset) for offset in range(0, nbytes, _READ)
        ]

        def read() -> None:
            first = transport.submit(lane, reads)
            for ticket in range(first, first + len(reads)):
                transport.engine.wait(ticket, lane.stream)
            if lane.on_gpu:
                torch.cuda.synchronize(lane.device)

        return nbytes / min(_seconds(read) for _ in range(_PASSES)) / _GB


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
