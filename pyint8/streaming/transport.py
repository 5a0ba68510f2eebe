"""The engine, with the files and the lanes that were opened in it."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pyint8.host import ending
from pyint8.remote.objects import remote_object
from pyint8.report import Span
from pyint8.streaming.detours import Detours, check_staging
from pyint8.streaming.extension import _core, open_engine
from pyint8.streaming.lane import Lane, LaneOpener, open_lane
from pyint8.streaming.naming import naming_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from pyint8.checkpoint import Entry, FileStamp
    from pyint8.config import StreamOptions
    from pyint8.streaming.early import EarlyTensor
    from pyint8.streaming.ranks.consumer import SharedConsumer
    from pyint8.streaming.requests import TensorRequest

logger = logging.getLogger(__name__)

_NOTHING_TO_BORROW = "borrow_gpus is for loads onto one GPU by one process: here it has no effect"


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A range of a file, in bytes, and the memory (a tensor of uint8, or a storage, on a lane's device) it fills.

    It starts at byte `at` of the memory. The file must be in the state `stamp`, if one is given. `checksum` is a number
    that `Transport.checksum_of` gave.
    """

    path: str
    offset: int
    nbytes: int
    memory: torch.Tensor | torch.UntypedStorage
    at: int = 0
    stamp: FileStamp | None = None
    checksum: int = _core.UNCHECKED


class Transport:
    """Moves ranges of files to lanes.

    Args:
        options: How to move bytes.
        opener: Makes the lane of a device.
        gpus: How many GPUs there will be lanes for.

    Attributes:
        engine: The extension's.
        before: Statistics of an engine that began the same load, in vain.
    """

    def __init__(self, options: StreamOptions, opener: LaneOpener = open_lane, gpus: int = 1) -> None:
        self._options = options
        self._opener = opener
        self._lanes: dict[torch.device, Lane] = {}
        self._opened: list[Lane] = []
        self._consumers: list[_core.Consumer] = []
        self._in_use: dict[int, torch.Tensor | torch.UntypedStorage] = {}  # by consumers, until they are closed
        self._files: dict[tuple[str, FileStamp | None], int] = {}
        self._borrows = gpus == 1 and bool(options.borrow_gpus)
        self._detours: list[Detours] = []
        self._is_closed = False
        self.before: dict[str, float] = {}
        threads = options.worker_threads(gpus + len(options.borrow_gpus) if self._borrows else gpus)
        if self._borrows:
            check_staging(options, threads)
        self._process = os.getpid()
        ending.begin(self)
        self.engine = open_engine(
            threads=threads,
            slots_per_thread=options.slots_per_thread,
            slot_bytes=options.slot_size(threads),
            direct_io=options.direct_io,
            timeline=options.timeline,
        )

    def lane(self, device: torch.device) -> Lane:
        """The one lane of a device.

        Raises:
            DeviceError: The driver refuses.
        """
        if device not in self._lanes:
            self._lanes[device] = self.open_lane(device)
            self._borrow_for(self._lanes[device], device)
        return self._lanes[device]

    def open_lane(self, device: torch.device) -> Lane:
        """Another lane of a device, with memory of its own."""
        lane = self._opener(self.engine, device, self._options)
        self._opened.append(lane)
        return lane

    def _borrow_for(self, lane: Lane, device: torch.device) -> None:
        """Opens other GPUs' buses for the only GPU of a load."""
        options = self._options
        if not options.borrow_gpus or not lane.on_gpu or self._detours:
            return
        if not self._borrows:
            if len(self._lanes) == 1:
                logger.warning(_NOTHING_TO_BORROW)
            return
        gpu = torch.cuda.current_device() if device.index is None else device.index
        self._detours.append(Detours(self.engine, lane.index, gpu, options.borrow_gpus, options.libcuda))

    def _tell_of_no_gpu(self) -> None:
        if not any(lane.on_gpu for lane in self._opened):
            logger.warning(_NOTHING_TO_BORROW)

    def submit(self, lane: Lane, reads: list[ReadRequest], *, first: bool = False) -> int:
        """Submits `reads` in order; returns the ticket of the first, the others' follow one by one.

        Args:
            lane: Where the memory lies.
            reads: Ranges of files.
            first: Read them before everything that waits.

        Raises:
            FileChangedError: A file is not the one whose header was read.
            ReadError: A file cannot be opened.
            DeviceError: Memory cannot be pinned.
        """
        wanted = [
            (self.file(read.path, read.stamp), read.offset, read.nbytes, read.memory.data_ptr() + read.at)
            for read in reads
        ]
        checksums = [read.checksum for read in reads]
        return self.engine.submit(lane.index, wanted, lane.stream, first=first, checksums=checksums)

    def open_consumer(
        self, lane: Lane, scratch_bytes: int, transposed: int, quantizer: int
    ) -> _core.Consumer | SharedConsumer:
        """The native consumer of a GPU's lane.

        Args:
            lane: One that is `on_gpu`.
            scratch_bytes: Memory of the GPU for what passes through.
            transposed: Elements of the largest weight that is transposed.
            quantizer: The address of bitsandbytes' `cint8_vector_quant`.

        Raises:
            DeviceError: The driver refuses, or has no kernels for the GPU.
        """
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=lane.device)
        half = torch.empty(transposed, dtype=torch.float16, device=lane.device)
        self.keep(scratch)
        self.keep(half)
        try:
            return self.make_consumer(lane, scratch, half, quantizer)
        except BaseException:
            self.let_go(scratch)
            self.let_go(half)
            raise

    def make_consumer(
        self, lane: Lane, scratch: torch.Tensor, half: torch.Tensor, quantizer: int, share: _core.Share | None = None
    ) -> _core.Consumer | SharedConsumer:
        """As `open_consumer`, with the memory that it uses, and what this process reads itself: None for all."""
        consumer = _core.Consumer(
            self.engine,
            lane.index,
            scratch=scratch.data_ptr(),
            scratch_bytes=scratch.nbytes,
            transposed=half.data_ptr(),
            transposed_bytes=half.nbytes,
            quantizer=quantizer,
            share=share or _core.Share(rank=0, ranks=1, least_bytes=0),
        )
        self._consumers.append(consumer)
        return consumer

    def submit_early(self, lane: Lane, reads: list[ReadRequest], *, is_agreed: bool = False) -> Sequence[int]:
        """As `submit`, of what there is memory for: as many of the first as all ranks have memory for.

        Args:
            lane: Where the memory lies.
            reads: Ranges of files.
            is_agreed: That is all of them, alike on all ranks.

        Returns:
            Their tickets.
        """
        first = self.submit(lane, reads) if reads else 0
        return range(first, first + len(reads))

    def whole_ones(self, _requests: Sequence[TensorRequest], _early: Collection[str], _budget: int) -> Collection[str]:
        """The names of requests, in the order in which they are served, that land as they are stored, in memory of
        their own, within a budget of bytes for all that is made, and for what it is made of."""
        return ()

    def agree(self, requests: Sequence[TensorRequest], early: Collection[str], quantizer: int | None) -> None:
        """Called with the arguments of a stream before it begins: all ranks must be about to do the same. If they are
        not, all of them fail, at the latest in `drain`."""

    def drain(self) -> None:
        """Called once all was taken that is wanted: what other ranks still need of this one is waited for."""

    def keep(self, memory: torch.Tensor | torch.UntypedStorage) -> None:
        """Keeps memory that is written to until all is closed, whatever becomes of who asked for it."""
        self._in_use[id(memory)] = memory

    def let_go(self, memory: torch.Tensor | torch.UntypedStorage) -> None:
        """Ends `keep`: the consumer's work on it was waited for."""
        self._in_use.pop(id(memory), None)

    def discard(self, early: dict[str, EarlyTensor]) -> None:
        """Frees early tensors that nobody needs, once the bus no longer writes to them.

        After an error, of reading one of them, this is to be closed before they go.
        """
        with naming_tensors(lambda: (tensor.entry for tensor in early.values())):
            for tensor in early.values():
                self.engine.wait(tensor.ticket, tensor.lane.stream)
        early.clear()

    def require_unchanged(self) -> None:
        """Raises FileChangedError if a file was written to since it was opened."""
        self.engine.require_unchanged()

    def stats(self) -> dict[str, float]:
        """The engine's statistics so far (see `LoadReport.engine`), with what was done `before`."""
        return {name: value + self.before.get(name, 0) for name, value in self.engine.stats().items()}

    def spans(self) -> Callable[[], list[Span]]:
        """What workers, buses and GPUs did when, to be called for once this is closed: there are thousands of them."""
        devices = {lane.index: str(lane.device) for lane in self._opened}
        lanes = {"copying": "bus to {}", "quantizing": "{}"}
        engine = self.engine
        return lambda: [
            Span(lanes[what].format(devices[who]) if what in lanes else f"worker {who}", what, begin, end, nbytes)
            for what, who, begin, end, nbytes in engine.spans()
        ]

    def close(self) -> None:
        """Stops reading, joins the workers, waits for copies under way, gives back pinned memory and scratch."""
        if os.getpid() != self._process:  # a forked child has no part in any of it
            return
        if self._options.borrow_gpus and self._opened and not self._is_closed:
            self._tell_of_no_gpu()
        self._is_closed = True
        with ExitStack() as stack:
            for lane in self._opened:
                stack.callback(lane.release)
            stack.callback(ending.end, self)
            stack.callback(self._in_use.clear)
            stack.callback(self._consumers.clear)
            for consumer in self._consumers:
                stack.callback(consumer.close)
            for detours in self._detours:
                stack.callback(detours.join)
            stack.callback(self.engine.close)  # the first to go

    def __del__(self) -> None:
        if getattr(self, "_consumers", None):  # a load failed halfway; memory must not go before those who write to it
            self.close()

    def checksum_of(self, entry: Entry) -> int:
        """The number of a new checksum, for reads that together have each byte of an entry once.

        The last of them does not arrive, but raises ChecksumError, if the bytes are not those that were saved.

        Raises:
            FileChangedError: The entry's file is not in the state that its header was read in.
            ReadError: It cannot be opened.
        """
        if entry.crc32c is None or not self._options.checksums:
            return _core.UNCHECKED
        return self.add_checksum(entry, entry.crc32c, self.file(entry.path, entry.stamp))

    def add_checksum(self, entry: Entry, expected: int, file: int) -> int:
        """The same, for an entry that has a checksum to compare with, and the engine's number of its file."""
        return self.engine.add_checksum(os.fsencode(entry.path), file, entry.offset, entry.nbytes, expected)

    def file(self, path: str, stamp: FileStamp | None) -> int:
        """The engine's number of a file, which it opens.

        Raises:
            FileChangedError: It is not in the state of `stamp`.
            ReadError: It cannot be opened.
        """
        number = self._files.get((path, stamp))
        if number is None:
            remote = remote_object(path)
            if remote is None:
                number = self.engine.add_file(os.fsencode(path), stamp)
            else:
                reader = remote.reader()
                number = self.engine.add_source(reader.ranges, reader.cancel, reader.run)
            self._files[path, stamp] = number
        return number
