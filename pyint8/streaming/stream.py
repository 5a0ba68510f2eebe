"""From checkpoint entries, in the order they will be taken, to tensors on their device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch

from pyint8.checkpoint import EntryInMemory
from pyint8.report import Recorder
from pyint8.streaming.chunks import Chunk, bands_of, cut, gather_batches, typed
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Made
from pyint8.streaming.naming import naming_tensors
from pyint8.streaming.pours import open_pours
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.transport import ReadRequest, Transport
from pyint8.streaming.transpose import Transposer

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.streaming.early import EarlyTensor
    from pyint8.streaming.pour import Pour


class TensorStream:
    """Reads ahead of need within the lanes' budgets; entries are best taken in the order they were given.

    An entry taken out of order is read on demand, into memory of its own. (`open_stream` makes one with a transport of
    its own.)

    Args:
        requests: In the order they will be taken; names are unique.
        transport: Moves the bytes. Its owner closes it before the stream, so that destinations are freed only once
            nothing writes to them.
        recorder: Counts bytes as they arrive.
        early: Tensors that are under way already; those that are not among the requests are discarded.
        begun: What makes the results of some of the requests already; from now on the stream's.
        quantizer: The address of bitsandbytes' `cint8_vector_quant`; without it nothing becomes int8 here.
        most_bytes: Of what is `made` for each GPU at a time: entries are released. None for all of it.

    Raises:
        FileChangedError: A file is not the one whose header was read.
        ReadError: A file cannot be opened.
        DeviceError: The driver refuses.
    """

    def __init__(
        self,
        requests: Sequence[TensorRequest],
        transport: Transport,
        *,
        recorder: Recorder | None = None,
        early: dict[str, EarlyTensor] | None = None,
        begun: Pour | None = None,
        quantizer: int | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self._recorder = Recorder() if recorder is None else recorder
        self._transport = transport
        early = {} if early is None else early
        early_lanes = (tensor.lane for tensor in early.values())
        self._host_lane = next((lane for lane in early_lanes if lane.device.type != "cuda"), None)
        self._engine = self._transport.engine
        self._transposer = Transposer(self._engine)
        self._chunks: dict[str, list[Chunk]] = {}
        self._checksums: dict[str, int] = {}  # the transport's, of entries that were begun
        transport.agree(requests, early, quantizer)
        self._pours = open_pours(requests, transport, self._lane, quantizer, early, self._recorder, most_bytes, begun)
        for request in requests:
            name = request.entry.name
            if name in self._pours:
                continue
            self._chunks[name] = self._take_over(request, early) or cut(request, self._lane(request.device))
        transport.discard(early)
        self._pending = gather_batches(self._chunks)
        self._cursor = 0
        self._fill_window()
        try:
            for pour in dict.fromkeys(self._pours.values()):
                pour.start()
        except BaseException:  # Ctrl-C: nobody has this stream yet
            transport.close()
            self.close()
            raise

    def close(self) -> None:
        """Gives destinations back; the transport is closed already. Idempotent."""
        for pour in dict.fromkeys(self._pours.values()):
            pour.close()
        self._pours.clear()
        self._chunks.clear()
        self._pending = []

    def batched(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The entry as a contiguous tensor of `dtype` (the same for all of its batch, whose memory it shares)."""
        chunk = self._chunks[name][0]
        if len(chunk.entries) == 1:
            return self.whole(name).to(dtype)
        if name not in chunk.landed:
            tensors = typed(self._land(chunk), chunk.entries[0], (len(chunk.entries), *chunk.entries[0].torch_shape))
            names = (entry.name for entry in chunk.entries)
            chunk.landed = dict(zip(names, tensors.to(dtype).unbind(), strict=True))
            del tensors
            self._release(chunk)
        return chunk.landed.pop(name)

    def makes(self, name: str) -> bool:
        """Whether the GPU's consumer makes what the request's `becomes` asked for."""
        return name in self._pours

    def lands_in_place(self, name: str) -> bool:
        """Whether an entry lands in its part of a larger tensor."""
        return self.makes(name) and self._pours[name].has_part(name)

    def made(self, name: str) -> Made | None:
        """What the request's `becomes` asked for; None where the GPU's consumer does not make it.

        Its values may come later; after `finish` they are there.
        """
        pour = self._pours.get(name)
        if pour is None:
            return None
        with self._naming_tensors():
            return pour.take(name)

    def made_of_parts(self, names: Sequence[str]) -> Made:
        """What entries that land in their place in one tensor make of it together."""
        pour = self._pours[names[0]]
        with self._naming_tensors():
            *_, whole = map(pour.take, names)
        return whole

    def wait(self, names: Iterable[str]) -> None:
        """Waits for the values of what was `made` of entries, so that they are ordered before the lanes' streams."""
        with self._naming_tensors():
            for name in names:
                if name in self._pours:
                    self._pours[name].wait(name)

    def release(self, names: Iterable[str]) -> None:
        """Makes room for what is still to be made, where that is bounded: these were waited for, and are used up."""
        for name in names:
            if name in self._pours:
                self._pours[name].release(name)

    def later(self, name: str) -> torch.Tensor:
        """As `whole`, but the values may come later; after `finish` they are there."""
        made = self.made(name)
        return self.whole(name) if made is None else made.tensor

    @property
    def serves_itself(self) -> bool:
        """Whether everything for a GPU is made by its consumer, or is there already: nobody has to take it in time."""
        return bool(self._pours) and all(chunk.early or not chunk.lane.on_gpu for chunk in self._pending)

    def finish(self) -> None:
        """Waits for the values of all that was `made`, so that they are ordered before the lanes' streams."""
        with self._naming_tensors():
            for pour in dict.fromkeys(self._pours.values()):
                pour.finish()
            self._transport.drain()

    def whole(self, name: str) -> torch.Tensor:
        """The entry as a tensor of its own, of its stored dtype and shape, contiguous."""
        if (made := self.made(name)) is not None:
            with self._naming_tensors():
                self._pours[name].wait(name)
            return made.tensor
        chunks = self._chunks[name]
        entry = chunks[0].request.entry
        if len(chunks) == 1 and chunks[0].region is None:
            memory = self._land(chunks[0])
            self._release(chunks[0])
            return typed(memory, entry, entry.torch_shape)
        tensor = torch.empty(entry.torch_shape, dtype=entry.torch_dtype, device=chunks[0].lane.device)
        for row, band in self.bands(name):
            tensor[row : row + len(band)] = band
        return tensor

    def bands(self, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The entry's rows: (first row, tensor [rows, ...] in scratch); a band is valid until the next."""
        for chunk in self._chunks[name]:
            memory = self._land(chunk)
            try:
                yield from bands_of(chunk, memory)
            finally:
                del memory
                self._release(chunk)

    def transposed_half(self, name: str, model_dtype: torch.dtype) -> torch.Tensor:
        """A Conv1D weight [in, out] as fp16 [out, in], rounded to `model_dtype` on the way; valid until the next."""
        first = self._chunks[name][0]
        entry, lane = first.request.entry, first.lane
        rows, columns = entry.torch_shape
        transposed = lane.transposed(columns, rows)
        for row, band in self.bands(name):
            self._transposer.transpose(lane, band, entry.dtype, model_dtype, transposed[:, row : row + len(band)])
        return transposed

    def _lane(self, device: torch.device) -> Lane:
        """A GPU has one lane for all streams; in host memory each stream has a lane of its own."""
        if device.type == "cuda":
            return self._transport.lane(device)
        if self._host_lane is None:
            self._host_lane = self._transport.open_lane(torch.device("cpu"))
        return self._host_lane

    def _take_over(self, request: TensorRequest, early: dict[str, EarlyTensor]) -> list[Chunk]:
        """The whole entry as one chunk, if an early tensor has it on the right device."""
        entry = request.entry
        tensor = early.get(entry.name)
        if tensor is None or not tensor.is_for(entry, self._lane(request.device)):
            return []
        del early[entry.name]
        rows = entry.torch_shape[0] if entry.torch_shape else 1
        chunk = Chunk(request, tensor.lane, 0, rows, 0, entry.nbytes, early=True)
        chunk.memory, chunk.ticket = tensor.memory, tensor.ticket
        return [chunk]

    def _fill_window(self) -> None:
        """Requests as much as the budgets allow, in order."""
        batch: list[Chunk] = []
        while self._cursor < len(self._pending):
            chunk = self._pending[self._cursor]
            if chunk.ticket is None and not isinstance(chunk.request.entry, EntryInMemory):
                if not self._allocate(chunk):
                    break
                if batch and batch[-1].lane is not chunk.lane:
                    self._submit(batch)
                    batch = []
                batch.append(chunk)
            self._cursor += 1
        self._submit(batch)

    def _allocate(self, chunk: Chunk) -> bool:
        """Gives a chunk its memory; False while there is no space."""
        lane = chunk.lane
        if chunk.through_scratch:
            chunk.region = lane.ring.acquire(chunk.nbytes)
            if chunk.region is None:
                return False
            chunk.memory = lane.buffer[chunk.region.start : chunk.region.start + chunk.nbytes]
            return True
        # Tensors of their own: request many at a time, so that small neighbours share reads.
        lane.filling = lane.filling or lane.bytes_in_flight <= lane.scratch_bytes // 2
        if lane.bytes_in_flight and (not lane.filling or lane.bytes_in_flight + chunk.nbytes > lane.scratch_bytes):
            lane.filling = False
            return False
        lane.bytes_in_flight += chunk.nbytes
        chunk.memory = torch.empty(chunk.nbytes, dtype=torch.uint8, device=lane.device)
        return True

    def _submit(self, chunks: list[Chunk], *, first: bool = False) -> None:
        if not chunks:
            return
        reads: list[ReadRequest] = []
        for chunk in chunks:
            assert chunk.memory is not None
            share = chunk.nbytes // len(chunk.entries)
            for number, entry in enumerate(chunk.entries):
                offset, checksum = entry.offset + chunk.start, self._checksum_of(entry)
                reads.append(
                    ReadRequest(entry.path, offset, share, chunk.memory, number * share, entry.stamp, checksum)
                )
        ticket = self._transport.submit(chunks[0].lane, reads, first=first)
        for chunk in chunks:
            chunk.ticket = ticket
            ticket += len(chunk.entries)

    def _checksum_of(self, entry: Entry) -> int:
        """One for all chunks of an entry."""
        if entry.name not in self._checksums:
            self._checksums[entry.name] = self._transport.checksum_of(entry)
        return self._checksums[entry.name]

    def _land(self, chunk: Chunk) -> torch.Tensor:
        """The chunk's memory, once the arrival of its bytes is ordered before the caller's stream."""
        entry = chunk.request.entry
        if isinstance(entry, EntryInMemory):
            self._recorder.landed(chunk.nbytes)
            flat = entry.value.reshape(-1).view(torch.uint8)
            return flat.clone() if flat.device == chunk.lane.device else flat.to(chunk.lane.device)
        if chunk.ticket is None:  # taken out of order: it gets memory of its own, and goes first
            chunk.lane.bytes_in_flight += chunk.nbytes
            chunk.memory = torch.empty(chunk.nbytes, dtype=torch.uint8, device=chunk.lane.device)
            self._submit([chunk], first=True)
        assert chunk.ticket is not None
        assert chunk.memory is not None
        with self._naming_tensors(), self._recorder.waiting():
            for ticket in range(chunk.ticket, chunk.ticket + len(chunk.entries)):
                self._engine.wait(ticket, chunk.lane.stream)
        self._recorder.landed(chunk.nbytes)
        return chunk.memory

    def _release(self, chunk: Chunk) -> None:
        """Called when all work on the chunk's memory is in the caller's stream, or the caller owns the memory."""
        if chunk.region is not None:
            chunk.lane.ring.release(chunk.region)
        elif not chunk.early:
            chunk.lane.bytes_in_flight -= chunk.nbytes
        chunk.memory = None
        self._fill_window()

    def _naming_tensors(self) -> AbstractContextManager[None]:
        return naming_tensors(self._entries)

    def _entries(self) -> Iterator[Entry]:
        yield from (entry for chunks in self._chunks.values() for entry in chunks[0].entries)
        yield from (pour.entry(name) for name, pour in self._pours.items())
