"""A transport of which each rank reads its part; to those above it is like any other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from pyint8.host.switches import quick_switches
from pyint8.streaming.extension import _core
from pyint8.streaming.lane import LaneOpener, open_lane
from pyint8.streaming.ranks.checksums import SharedChecksums
from pyint8.streaming.ranks.conductor import Conductor
from pyint8.streaming.ranks.consumer import SharedConsumer
from pyint8.streaming.ranks.fingerprint import check_alike, fingerprint
from pyint8.streaming.ranks.meetings import Meeting
from pyint8.streaming.ranks.pieces import Piece, own_reads, part_of, share_of, together
from pyint8.streaming.ranks.wholes import whole_ones
from pyint8.streaming.transport import ReadRequest, Transport

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.config import StreamOptions
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.requests import TensorRequest


# Tensors of a head start: they take longer to read than ranks need to agree.
_BEFORE_AGREED = 64


class SharedTransport(Transport):
    """Moves ranges of files to the memory of all ranks.

    What is asked for to be read first, out of its order, is read by this rank alone; so is what lands elsewhere than on
    the ranks' device, and what Python makes beside a GPU's consumer, since no order of the two is the same everywhere.

    Args:
        conductor: Gathers.
        number: Of the load, among those of these ranks.
        options: How to move bytes.
        opener: Makes the lane of a device.
    """

    def __init__(
        self, conductor: Conductor, number: int, options: StreamOptions, opener: LaneOpener = open_lane
    ) -> None:
        super().__init__(options.for_ranks(), opener)
        self._borrows = False
        self._forgone: list[Piece] = []  # that not all ranks have memory for, but this one has begun to read
        self._switches = ExitStack()
        self._switches.enter_context(quick_switches())  # for the conductor's thread, beside one that builds the model
        self._conductor = conductor
        self._number = number
        self._checksums = SharedChecksums(self.engine)
        conductor.attach(self.engine)

    def submit(self, lane: Lane, reads: list[ReadRequest], *, first: bool = False) -> int:
        if first or self._consumers or lane.device != self._conductor.group.device:
            return super().submit(lane, reads, first=first)
        pieces = self._ask(lane, reads)
        self._conductor.put(*pieces)
        return pieces[0].promised.start

    def _ask(self, lane: Lane, reads: list[ReadRequest]) -> list[Piece]:
        """Pieces that are to be gathered, of which this rank's parts are asked for."""
        if not reads:
            return []
        group = self._conductor.group
        chunks = list(together(reads))
        mine = [own_reads(chunk, group.rank, group.size) for chunk in chunks]
        flat = [read for of_chunk in mine for read in of_chunk]
        ticket = super().submit(lane, flat) if flat else 0
        promised = self.engine.promise(lane.index, len(reads))
        pieces = []
        for chunk, of_chunk in zip(chunks, mine, strict=True):
            memory = _memory_of(chunk, lane.device)
            tickets = range(ticket, ticket + len(of_chunk))
            whole = range(promised, promised + len(chunk))
            pieces.append(Piece(memory, part_of(memory.numel(), group.size), tickets, whole))
            ticket, promised = tickets.stop, whole.stop
        return pieces

    def add_checksum(self, entry: Entry, expected: int, file: int) -> int:
        """As any transport's, but that `drain` compares: no rank reads all bytes of a tensor."""
        return self._checksums.add(entry, file)

    def make_consumer(
        self, lane: Lane, scratch: torch.Tensor, half: torch.Tensor, quantizer: int, share: _core.Share | None = None
    ) -> SharedConsumer:
        group = self._conductor.group
        consumer = super().make_consumer(lane, scratch, half, quantizer, share or share_of(group.rank, group.size))
        assert isinstance(consumer, _core.Consumer)
        shared = SharedConsumer(consumer, self._conductor, scratch)
        self._conductor.attach(self.engine, shared)
        return shared

    def submit_early(self, lane: Lane, reads: list[ReadRequest], *, is_agreed: bool = False) -> Sequence[int]:
        """As any transport's. The first parts are asked for before ranks agree how many all have memory for."""
        if is_agreed:
            pieces = self._ask(lane, reads)
        else:
            self._forgone = first = self._ask(lane, reads[:_BEFORE_AGREED])  # until they have agreed, or if they cannot
            count = int(min(self._meet("its head start", len(reads))))
            self._checksums.forget({read.checksum for read in reads[count:]})
            pieces = (first + self._ask(lane, reads[len(first) : count]))[:count]
            self._forgone = first[count:]
        self._conductor.put(*pieces)
        self._forgo(lane)
        return [ticket for piece in pieces for ticket in piece.promised]

    def _forgo(self, lane: Lane) -> None:
        """Gives the memory back, which the load has better uses for, once nothing is on its way to it."""
        for piece in self._forgone:
            for ticket in piece.tickets:
                self.engine.wait(ticket, lane.stream)
        self._forgone.clear()

    def whole_ones(self, requests: Sequence[TensorRequest], early: Collection[str], budget: int) -> Collection[str]:
        return whole_ones(requests, early, budget, self._conductor.group.size)

    def agree(self, requests: Sequence[TensorRequest], early: Collection[str], quantizer: int | None) -> None:
        gpus = dict.fromkeys(request.device for request in requests if request.device.type == "cuda")
        lanes = [(lane.on_gpu, lane.scratch_bytes) for lane in map(self.lane, gpus)]
        facts = [lanes, self._options.host_scratch, quantizer is not None]
        mine = fingerprint(requests, early, facts, checksums=self._options.checksums)
        # Nobody waits for it here: each rank reads its parts meanwhile, of which nothing is gathered before.
        self._conductor.put(self._meeting("its plan", mine, check_alike))

    def _meet(self, stage: str, value: Any) -> list[Any]:
        return self._conductor.hold(self._meeting(stage, value))

    def _meeting(self, stage: str, value: Any, check: Callable[[list[Any]], object] = lambda _: None) -> Meeting:
        return Meeting(f"{stage} of load {self._number}", value, is_urgent=True, check=check)

    def drain(self) -> None:
        """As any transport's.

        Raises:
            ChecksumError: The bytes of a tensor are not those that were saved.
        """
        self._conductor.wait_for(self._conductor.is_done)
        if self._checksums:
            self._checksums.compare(self._meet("the checksums", self._checksums.of_parts()))

    def close(self) -> None:
        try:
            if hasattr(self, "_conductor"):  # else `__init__` was interrupted
                self._conductor.attach(None)
                self._switches.close()
                self._conductor.group.settle()
        finally:
            super().close()
        self._forgone.clear()


def _memory_of(reads: Sequence[ReadRequest], device: torch.device) -> torch.Tensor:
    memory = reads[0].memory
    if isinstance(memory, torch.UntypedStorage):
        memory = torch.empty(0, dtype=torch.uint8, device=device).set_(memory)
    return memory[: sum(read.nbytes for read in reads)]
