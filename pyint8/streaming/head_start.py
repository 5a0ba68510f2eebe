"""A head start: what a stream needs, and its first tensors, while the model is still being built."""

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
    """A tensor that was asked for before anybody knew what it is for."""

    entry: Entry
    lane: Lane
    storage: torch.UntypedStorage
    ticket: int

    @property
    def memory(self) -> torch.Tensor:
        """The storage as uint8."""
        return torch.empty(0, dtype=torch.uint8, device=self.lane.device).set_(self.storage)


class HeadStart:
    """Opens an engine, pins its memory and asks for the first tensors, in a thread.

    Args:
        device: A CUDA device that tensors will land on.
        entries: In the order they will be asked for, if they all go to `device`; else none.
        nbytes: How much memory of the device they may take.
        reserved: How much memory the load will need at least: torch's allocator is given that much at once, for the
            first tensors and what is made of them.
        if_free: Asks for tensors only if so much memory of the device is free.
        options: How to move bytes.
        gpus: How many GPUs tensors may land on.
        opener: Makes the lane of a device (another one for tests).

    Attributes:
        reserves: Whether it saw to the device's memory; known once it is taken.
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
        # A thread begins on the default stream; the caller may be on another.
        self._stream = torch.cuda.current_stream(device) if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, args=(entries, nbytes), name="pyint8 head start")
        self._thread.start()

    def take(self) -> tuple[Transport, dict[str, EarlyTensor]]:
        """The transport, now the caller's to close, and by name what is on its way.

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
        """Drops everything, for a load that failed before it took it; nothing if it did. Idempotent."""
        self._thread.join()
        self._error = None  # it knows this object
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
        except BaseException as error:  # for whoever takes it
            self._error = error

    def _ask(self, lane: Lane, entries: Sequence[Entry], nbytes: int) -> None:
        """Asks for all at once, by storages: allocating a tensor releases the interpreter's lock, and the thread that
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
            except torch.OutOfMemoryError:  # the load itself may need less at a time
                break
        reads = [
            ReadRequest(entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp) for entry, storage in wanted
        ]
        first = self._transport.submit(lane, reads) if reads else 0
        for ticket, (entry, storage) in enumerate(wanted, first):
            self._early[entry.name] = EarlyTensor(entry, lane, storage, ticket)

    def _has_room(self, device: torch.device) -> bool:
        """Whether the device's memory is enough, and torch's allocator has, or was given, what is to be reserved."""
        if device.type != "cuda":
            return True
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if torch.cuda.mem_get_info(device)[0] + held < self._if_free:
            return False
        return reserve_memory(device, self._reserved)
