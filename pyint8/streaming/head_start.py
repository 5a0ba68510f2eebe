"""A head start: the engine is opened and the first tensors are read while the model is still being built."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pyint8.checkpoint import EntryInMemory
from pyint8.streaming.lane import Lane, LaneOpener, open_lane, reserve_memory
from pyint8.streaming.transport import ReadRequest, Transport

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.config import StreamOptions

# Smaller tensors are asked for later, together: they would take longer to ask for than to read.
_WORTHWHILE_BYTES = 1 << 20


@dataclass(frozen=True)
class EarlyTensor:
    """A tensor that was requested before its parameter was known."""

    entry: Entry
    lane: Lane
    storage: torch.UntypedStorage
    ticket: int

    @property
    def memory(self) -> torch.Tensor:
        """The storage as uint8."""
        return torch.empty(0, dtype=torch.uint8, device=self.lane.device).set_(self.storage)


class HeadStart:
    """Opens an engine, pins its memory and requests the first tensors, in a thread.

    Args:
        device: A CUDA device that tensors will land on.
        entries: In the order the load will take them, if all of them go to `device`; else none.
        nbytes: The most memory of the device that they may take.
        reserved: The least memory that the load will need, in bytes: torch's allocator gets that much in one piece,
            for the first tensors and what is made of them.
        if_free: Bytes of the device that must be free; else no tensors are requested.
        options: How to move bytes.
        gpus: How many GPUs tensors may land on.
        opener: Makes the lane of a device (another one for tests).

    Attributes:
        reserves: Whether it reserved the device's memory; known once its transport is taken.
    """

    def __init__(
        self,
        device: torch.device,
        entries: Sequence[Entry],
        nbytes: int,
        options: StreamOptions,
        *,
        reserved: int = 0,
        if_free: int = 0,
        gpus: int = 1,
        opener: LaneOpener = open_lane,
    ) -> None:
        self._device = device
        self._error: BaseException | None = None
        self._early: dict[str, EarlyTensor] = {}
        self._transport = Transport(options, opener, gpus)
        self._taken = False
        self.reserves = False
        self._reserved, self._if_free = reserved, if_free
        # A new thread uses the default stream; the caller may use another.
        self._stream = torch.cuda.current_stream(device) if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(entries, nbytes), name="pyint8 head start")
        self._thread.start()

    def take(self) -> tuple[Transport, dict[str, EarlyTensor]]:
        """The transport, now the caller's to close, and by name the tensors that are under way.

        Raises:
            FileChangedError: A file is not the one whose header was read.
            ReadError: A file cannot be opened.
            DeviceError: The driver refuses, or memory cannot be pinned.
        """
        self._thread.join()
        if self._error is not None:
            self._transport.close()
            raise self._error
        self._taken = True
        early, self._early = self._early, {}
        return self._transport, early

    def close(self) -> None:
        """Discards everything, unless a load has taken it. Idempotent."""
        self._thread.join()
        self._error = None  # breaks a reference cycle
        if self._taken:
            return
        self._transport.close()
        self._early.clear()

    def _run(self, entries: Sequence[Entry], nbytes: int) -> None:
        try:
            where: Any = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
            with where:
                lane = self._transport.lane(self._device)
                if lane.device == self._device:
                    self._transport.engine.prepare(lane.index)
                    if entries and self._has_room(lane.device):
                        self.reserves = self._reserved > 0
                        self._ask(lane, entries, nbytes)
        except BaseException as error:  # raised by `take`
            self._error = error

    def _ask(self, lane: Lane, entries: Sequence[Entry], nbytes: int) -> None:
        """Requests all at once, as storages: allocating a tensor releases the interpreter's lock, and the thread that
        builds the model would take it each time (docs/performance.md, "The interpreter's lock")."""
        wanted: list[tuple[Entry, torch.UntypedStorage]] = []
        for entry in entries:
            if entry.nbytes < _WORTHWHILE_BYTES or isinstance(entry, EntryInMemory):
                continue
            nbytes -= entry.nbytes
            if nbytes < 0:
                break
            try:
                wanted.append((entry, torch.UntypedStorage(entry.nbytes, device=lane.device)))
            except torch.OutOfMemoryError:  # the load itself may get by with less at a time
                break
        reads = [
            ReadRequest(entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp) for entry, storage in wanted
        ]
        first = self._transport.submit(lane, reads) if reads else 0
        for ticket, (entry, storage) in enumerate(wanted, first):
            self._early[entry.name] = EarlyTensor(entry, lane, storage, ticket)

    def _has_room(self, device: torch.device) -> bool:
        """Whether the device has enough memory, and torch's allocator now holds what is to be reserved."""
        if device.type != "cuda":
            return True
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] + held < self._if_free:
            return False
        return reserve_memory(device, self._reserved)
