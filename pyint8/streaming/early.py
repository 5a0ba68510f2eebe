"""Tensors that land on a GPU as they are stored, each in memory of its own, before anything is made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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


def reads_into(transport: Transport, wanted: Iterable[tuple[Entry, torch.UntypedStorage]]) -> list[ReadRequest]:
    """Of whole entries, each into its storage."""
    return [
        ReadRequest(
            entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp, checksum=transport.checksum_of(entry)
        )
        for entry, storage in wanted
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
        tickets = self._transport.submit_early(self._lane, reads_into(self._transport, wanted), is_agreed=True)
        for ticket, (entry, storage) in zip(tickets, wanted, strict=True):
            self._tensors[entry.name] = EarlyTensor(entry, self._lane, storage, ticket)
            self.nbytes += entry.nbytes

    def let_go(self, name: str) -> None:
        """Its result is made, if it is one of these."""
        if (tensor := self._tensors.pop(name, None)) is not None:
            self.nbytes -= tensor.entry.nbytes
            self._transport.let_go(tensor.storage)

    def clear(self) -> None:
        self._tensors.clear()
