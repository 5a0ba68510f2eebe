"""What becomes of tensors on a GPU with no Python between the request and the result: by the extension's consumer.

The consumer serves requests in order, whether or not somebody waits for them, so their results can be handed out before
their bytes are there: a model is put together while it is still coming. Results are allocated here, as soon as they
take, with what landed early and is still to be made smaller, no more than all results will. What landed early goes as
fast as it is made smaller, so a thread uses its room at once: the bus would stand still until the caller comes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.early import EarlyTensors
from pyint8.streaming.made import Made, Place, empty_results, first_parts, memory_for
from pyint8.streaming.pump import Pump
from pyint8.streaming.requests import KERNEL_NAMES, TensorRequest, ToDtype, ToInt8

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.report import Recorder
    from pyint8.streaming.early import EarlyTensor
    from pyint8.streaming.extension import _core
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.transport import Transport

# The first requests are few, so that bytes begin to move while the others are written down.
_FIRST_REQUESTS = 64
# Of the others some are served while more are written down.
_MOST_AT_ONCE = 512
# More is asked for once so much of what landed early is served, or half of what was asked for.
_ROOM_BYTES = 512 << 20
# Into so many parts the wait for the end is divided: as often a bar moves, however many requests there are.
_STEPS = 256


class Pour:
    """What one GPU's consumer makes of requests; thread-safe.

    Args:
        transport: What moves the bytes; it closes the consumer.
        lane: The GPU's.
        requests: Each of which `can_pour`, in the order they will be asked for, and served; names are unique.
        quantizer: The address of bitsandbytes' `cint8_vector_quant`.
        scratch_bytes: Memory of the GPU for what passes through.
        early: What is on its way to `lane` already, by name.
        recorder: Told of bytes as they land.
        most_bytes: Of results at a time, as far as one alone does not take more: what was taken is to be released. None
            for all results.

    Attributes:
        requests: As given.

    Raises:
        DeviceError: The driver refuses, or has no kernels for the GPU.
    """

    def __init__(
        self,
        transport: Transport,
        lane: Lane,
        requests: Sequence[TensorRequest],
        quantizer: int,
        scratch_bytes: int,
        early: dict[str, EarlyTensor],
        recorder: Recorder,
        most_bytes: int | None = None,
    ) -> None:
        self._lock = threading.RLock()  # guards everything
        self._error: BaseException | None = None  # of requests that were begun to be written down
        self._transport = transport
        self._lane = lane
        firsts = first_parts(requests)
        self._budget = sum(request.allocated_bytes for request in firsts) if most_bytes is None else most_bytes
        self.requests = requests
        self._tickets = {request.entry.name: ticket for ticket, request in enumerate(requests)}
        self._recorder = recorder
        self._read_first = 1 + max((self._tickets[name] for name in early), default=-1)
        self._made: dict[int, Made] = {}
        self._wholes: dict[str, Place] = {}  # of which entries are parts, by name
        self._made_bytes = 0
        self._is_bounded = most_bytes is not None
        self._taken: dict[int, Made] = {}  # and not released, if it is bounded
        self._early = EarlyTensors(transport, lane, early, transport.whole_ones(requests, early, self._budget))
        self._submitted = self._ready = 0
        self._stride = 1 + len(requests) // _STEPS
        marks = sum(request.marks for request in firsts)
        self._marks = torch.zeros(marks, dtype=torch.uint8, device=lane.device)
        self._marks_used = 0
        transposed = max((r.entry.numel for r in requests if r.is_transposed), default=0)
        self._pump = Pump(lane.device)
        self._consumer = transport.open_consumer(lane, scratch_bytes, transposed, quantizer)

    def tell(self, recorder: Recorder) -> None:
        """From now on another recorder is told: nothing has been waited for yet."""
        self._recorder = recorder

    def allocate(self) -> None:
        """Takes memory for all larger tensors at once, where there is room: each time the interpreter's lock is let go,
        and a thread gets it back late (docs/performance.md, "The interpreter's lock")."""
        with self._lock:
            for request in first_parts(self.requests):
                if request.part is not None and request.part.name not in self._wholes:
                    self._allocate(request)

    def ask(self, count: int = _FIRST_REQUESTS) -> None:
        """Asks for the first requests, as far as there is room."""
        with self._lock:
            self._fill(count)

    def start(self) -> None:
        """Asks for all that there is room for. From now on what early tensors leave is used at once, and `close` must
        follow. Idempotent for who has none."""
        self.ask(len(self.requests))
        if self._early and not self._is_bounded:
            self._pump.start(self._go_on)

    def _go_on(self) -> bool:
        """Asks for more once there is some room; False where none will come."""
        with self._lock:
            if not self._early or self._ready == self._submitted:
                return False
            ticket = self._making_room()
        ready = self._consumer.wait(ticket, self._lane.stream)
        with self._lock:
            self._note(ready)
        return True

    def _making_room(self) -> int:
        """The request that leaves some room once it is served: what one tensor leaves may not hold another."""
        half, nbytes = (self._ready + self._submitted - 1) // 2, 0
        for ticket in range(self._ready, half):
            nbytes += self._early.bytes_of(self.requests[ticket].entry.name)
            if nbytes >= _ROOM_BYTES:
                return ticket
        return half

    def has_part(self, name: str) -> bool:
        """Whether the values of an entry are a part of a larger tensor."""
        return self.requests[self._tickets[name]].part is not None

    def entry(self, name: str) -> Entry:
        return self.requests[self._tickets[name]].entry

    def take(self, name: str) -> Made:
        """What comes of an entry, each once; its values are there once it was waited for, at the latest by `finish`."""
        ticket = self._tickets[name]
        lock = self._guarded()
        # Without the lock, if it can be: the pump's thread has that for milliseconds while it asks for more.
        if self._pump.runs and (made := self._made.pop(ticket, None)) is not None:
            return made
        with lock:
            while ticket >= self._submitted:
                if self._ready < self._submitted:
                    self._wait(self._ready)
                else:  # it is what there was no room for
                    self._submit(self._submitted + 1)
            if self._early and not self._pump.runs and self._consumer.done() > self._ready:
                self._wait(self._ready)
            made = self._made.pop(ticket)
            if self._is_bounded:
                self._taken[ticket] = made
        return made

    def wait(self, name: str) -> None:
        """Until the values of an entry that was taken are ordered before the lane's stream."""
        ticket = self._tickets[name]
        with self._guarded():
            if ticket >= self._ready:
                self._wait(ticket)

    def release(self, name: str) -> None:
        """Makes room for other results: what came of an entry was taken and waited for, and is of no more use."""
        ticket = self._tickets[name]
        with self._guarded():
            request, made = self.requests[ticket], self._taken.pop(ticket)
            for memory in (made.tensor, made.scales):
                if memory is not None:
                    self._transport.let_go(memory)
            if request.part is not None:
                self._wholes.pop(request.part.name, None)
            self._made_bytes -= request.final_bytes
            self._fill(len(self.requests))

    def finish(self) -> None:
        """Waits until that is so for all entries."""
        with self._guarded():
            while self._ready < len(self.requests):
                self._submit(max(self._submitted, self._ready + 1))
                is_all = self._submitted == len(self.requests)
                self._wait(min(self._ready + self._stride, self._submitted) - 1 if is_all else self._ready)
            self._check()

    def _guarded(self) -> threading.RLock:
        """The lock, for the caller. A forked child, where nobody would give it back, gets an error instead."""
        self._consumer.done()
        self._check()
        return self._lock

    def _check(self) -> None:
        """Raises what stopped the thread, or what left requests half written down."""
        error = self._error or self._pump.error
        if error is not None:
            raise error

    def _wait(self, ticket: int) -> None:
        self._check()
        with self._recorder.waiting():
            ready = self._consumer.wait(ticket, self._lane.stream)
        self._note(ready)

    def _note(self, ready: int) -> None:
        """Notes how many requests are served; asks for more, where there is room."""
        before, self._ready = self._ready, max(self._ready, ready)
        landed = self.requests[before : self._ready]
        self._recorder.landed(sum(request.entry.nbytes for request in landed))
        for request in landed if self._early else ():
            self._early.let_go(request.entry.name)  # its memory, before more is taken
        self._fill(len(self.requests))

    def close(self) -> None:
        """Gives destinations back that nobody took; the transport is closed already, which ended waits. Idempotent."""
        self._pump.join()
        self._error = None  # breaks a reference cycle
        self._made.clear()
        self._taken.clear()
        self._wholes.clear()
        self._early.clear()

    def _fill(self, until: int) -> None:
        """Submits requests up to number `until`, as far as memory allows."""
        end = self._submitted
        nbytes = self._made_bytes + self._early.nbytes
        begun: set[str] = set()
        while end < min(until, len(self.requests)):
            request = self.requests[end]
            needed = memory_for(request, begun, self._wholes) + self._early.bytes_for(request)
            nbytes += needed
            is_too_much = needed > 0 and nbytes > self._budget
            if is_too_much and (end > self._ready or self._holds_all):
                break
            end += 1
        self._submit(end)

    @property
    def _holds_all(self) -> bool:
        """Whether what is made takes all that there is, as one large tensor may: another waits until it is released."""
        return self._is_bounded and self._made_bytes > self._budget

    def _submit(self, end: int) -> None:
        """Requests are served in order: what is not early, but is before something that is, is read first."""
        self._check()
        for until, first in ((min(end, self._read_first), True), (end, False)):
            while until > self._submitted:
                some = range(self._submitted, min(until, self._submitted + _MOST_AT_ONCE))
                try:
                    self._early.ask(self.requests[some.start : some.stop])
                    self._consumer.submit(list(map(self._written_down, some)), self._lane.stream, first=first)
                except BaseException as error:
                    self._error = error
                    raise
                self._submitted = some.stop

    def _written_down(self, ticket: int) -> _core.RequestTuple:
        """A request as the extension takes it; allocates what it makes, unless that is part of what is there."""
        request = self.requests[ticket]
        entry, becomes, part = request.entry, request.becomes, request.part
        place = None if part is None else self._wholes.get(part.name)
        if place is None:
            place = self._allocate(request)
        self._made[ticket] = place.made
        offset = 0 if part is None else part.offset
        source = self._source(entry)
        if isinstance(becomes, ToInt8):
            assert place.scales != 0
            through_bfloat16 = becomes.model_dtype == torch.bfloat16
            rows, columns = entry.torch_shape
            row = offset // place.columns
            scales = place.scales + row * torch.float32.itemsize
            to_int8 = (through_bfloat16, becomes.transposed, place.values + offset, scales)
            return source, entry.dtype, rows, columns, to_int8, place.marks + row
        assert isinstance(becomes, ToDtype)
        address = place.values + offset * becomes.dtype.itemsize
        if becomes.dtype == entry.torch_dtype:
            return source, "", 1, entry.nbytes, ("", address), place.marks
        return source, entry.dtype, entry.numel, 1, (KERNEL_NAMES[becomes.dtype], address), place.marks

    def _source(self, entry: Entry) -> tuple[bool, int, int, int]:
        early = self._early.get(entry.name)
        if early is not None:
            return True, early.ticket, early.storage.data_ptr(), 0
        file, checksum = self._transport.file(entry.path, entry.stamp), self._transport.checksum_of(entry)
        return False, file, entry.offset, checksum

    def _allocate(self, request: TensorRequest) -> Place:
        """Memory for what a request makes, or makes a part of."""
        self._made_bytes += request.allocated_bytes
        values, scales = empty_results(request, self._lane.device)
        count = request.marks
        marks = self._marks[self._marks_used : self._marks_used + count] if count else None
        self._marks_used += count
        made = Made(values, scales, marks)
        for memory in (values, scales):
            if memory is not None:
                self._transport.keep(memory)
        addresses = (0 if memory is None else memory.data_ptr() for memory in (values, scales, marks))
        place = Place(made, values.shape[-1] if values.ndim else 1, *addresses)
        if request.part is not None:
            self._wholes[request.part.name] = place
        return place
