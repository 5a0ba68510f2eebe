"""A device from the stream's view: a lane of the engine, the caller's CUDA stream, and scratch memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pyint8.errors import DeviceError
from pyint8.streaming.extension import _core
from pyint8.streaming.scratch import ScratchRing

if TYPE_CHECKING:
    from pyint8.config import StreamOptions

logger = logging.getLogger(__name__)

# One band of a weight takes this fraction of the scratch: the next ones arrive while one is quantized.
_BANDS_IN_SCRATCH = 8


@dataclass(eq=False)
class Lane:
    """Where tensors land.

    Attributes:
        device: The torch device of the memory.
        index: The engine's number of this lane.
        stream: The caller's stream as an integer; work on landed tensors is ordered after their arrival on it.
        scratch_bytes: Memory for weights on their way to int8, allocated when first needed.
        on_gpu: Whether the engine has the GPU itself, so that a consumer can serve it.
        bytes_in_flight: Bytes requested into tensors of their own and not yet taken.
    """

    device: torch.device
    index: int
    stream: int
    scratch_bytes: int
    on_gpu: bool = False
    ring: ScratchRing = field(init=False)
    bytes_in_flight: int = 0
    filling: bool = True
    _buffer: torch.Tensor | None = None
    _transposed: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # The rest holds the band being quantized: its fp16 form and its codes.
        self.ring = ScratchRing(self.scratch_bytes * (_BANDS_IN_SCRATCH - 2) // _BANDS_IN_SCRATCH)

    def leave_scratch(self, nbytes: int) -> None:
        """Leaves so much of scratch, none of which is in use, to somebody else."""
        self.scratch_bytes -= nbytes
        self.__post_init__()

    @property
    def band_bytes(self) -> int:
        """The most that one band of rows should take."""
        return self.scratch_bytes // _BANDS_IN_SCRATCH

    @property
    def buffer(self) -> torch.Tensor:
        """The scratch memory itself, uint8."""
        if self._buffer is None:
            self._buffer = torch.empty(self.ring.size, dtype=torch.uint8, device=self.device)
        return self._buffer

    def transposed(self, rows: int, columns: int) -> torch.Tensor:
        """fp16 [rows, columns] for one transposed weight at a time: new memory for each would be new pages for each."""
        if self._transposed is None or self._transposed.numel() < rows * columns:
            self._transposed = None  # first: not both at once
            self._transposed = torch.empty(rows * columns, dtype=torch.float16, device=self.device)
        return self._transposed[: rows * columns].view(rows, columns)

    def release(self) -> None:
        """Gives the scratch memory back, once the engine is closed; tensors that use part of it keep it alive."""
        self._buffer = self._transposed = None


def reserve_memory(device: torch.device, nbytes: int) -> bool:
    """Gives torch's allocator so much of a GPU's memory in one piece.

    Many small ones take longer to get, and stay apart. What it holds from an earlier load is used again.

    Returns:
        False where there is not so much.
    """
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if held >= nbytes // 2:
        return True
    try:
        torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:  # let the load find out, which may need less at a time
        return False
    return True


LaneOpener = Callable[[_core.Engine, torch.device, "StreamOptions"], Lane]


def open_lane(engine: _core.Engine, device: torch.device, options: StreamOptions) -> Lane:
    """A lane for `device`: of its own for a CUDA device, else in host memory, from where torch copies tensors.

    A CUDA device whose driver does not open (torch for AMD GPUs, say) is served through host memory too, with a
    warning.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        device = torch.device("cuda", index)
        torch.zeros(1, device=device)  # torch makes the context, with its own flags
        try:
            number = engine.add_cuda_device(index, options.libcuda)
        except DeviceError as error:
            logger.warning("tensors for %s go through pageable host memory, slowly: %s", device, error)
        else:
            stream = torch.cuda.current_stream(device).cuda_stream
            return Lane(device, number, stream, options.device_scratch, on_gpu=True)
    number = engine.add_host_device(options.worker_threads())
    return Lane(torch.device("cpu"), number, 0, options.host_scratch)
