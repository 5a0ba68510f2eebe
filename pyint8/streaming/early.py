"""Tensors that land on a GPU as they are stored, each in memory of its own, before anything is made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.transport import ReadRequest

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.requests import TensorRequest
    from pyint8.streaming.transport import Transport


@dataclass(frozen=True)
class EarlyTensor:
    """A tensor that was requested before its result was."""

    entry: Entry
    lane: Lane
    storage: torch.UntypedStorage
    ticket: int

    def is_for(self, entry: Entry, lane: Lane) -> bool:
        """Whether this is what an entry is wanted as, where it is wanted."""
        return self.lane is lane and (self.entry is entry or self.entry == entry)

    @property
    def memory(self) -> torch.Tensor:
        """The storage as uint8."""
        return torch.empty(0, dtype=torch.uint8, device=self.lane.device).set_(self.storage)


def ask_early(
    transport: Transport, lane: Lane, wanted: Sequence[tuple[Entry, torch.UntypedStorage]], *, is_agreed: bool = False
) -> list[EarlyTensor]:
    """Asks for whole entries, each into its storage: for the first of them, as `Transport.submit_early` says."""
    reads = [
        ReadRequest(
            entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp, checksum=transport.checksum_of(entry)
        )
        for entry, storage in wanted
    ]
    tickets = transport.submit_early(lane, reads, is_agreed=is_agreed)
    return [
        EarlyTensor(entry, lane, storage, ticket) for ticket, (entry, storage) in zip(tickets, wanted, strict=False)
    ]


class EarlyTensors:
    """Those that a `Pour` makes its results of.

    Args:
        transport: What moves the bytes.
        lane: The GPU's.
        tensors: What is on its way already, by name.
        whole: The names of others that are to land so, once they are asked for.

    Attributes:
        nbytes: The memory they take.
    """

    def __init__(
        self, transport: Transport, lane: Lane, tensors: dict[str, EarlyTensor], whole: Collection[str]
    ) -> None:
        self._transport = transport
        self._lane = lane
        self._tensors = dict(tensors)
        self._whole = whole
        self.nbytes = sum(tensor.entry.nbytes for tensor in tensors.values())

    def __bool__(self) -> bool:
        return bool(self._tensors)

    def get(self, name: str) -> EarlyTensor | None:
        return self._tensors.get(name)

    def bytes_of(self, name: str) -> int:
        """How much memory one of these takes; 0 if it is none of them."""
        tensor = self._tensors.get(name)
        return 0 if tensor is None else tensor.entry.nbytes

    def bytes_for(self, request: TensorRequest) -> int:
        """How much memory is taken when a request is asked for."""
        return request.entry.nbytes if request.entry.name in self._whole else 0

    def ask(self, requests: Iterable[TensorRequest]) -> None:
        """Asks for those of some requests that are to land so."""
        entries = [request.entry for request in requests if request.entry.name in self._whole]
        wanted = [(entry, torch.UntypedStorage(entry.nbytes, device=self._lane.device)) for entry in entries]
        if not wanted:
            return
        for _, storage in wanted:
            self._transport.keep(storage)
        for tensor in ask_early(self._transport, self._lane, wanted, is_agreed=True):
            self._tensors[tensor.entry.name] = tensor
            self.nbytes += tensor.entry.nbytes

    def let_go(self, name: str) -> None:
        """Its result is made, if it is one of these."""
        if (tensor := self._tensors.pop(name, None)) is not None:
            self.nbytes -= tensor.entry.nbytes
            self._transport.let_go(tensor.storage)

    def clear(self) -> None:
        self._tensors.clear()
