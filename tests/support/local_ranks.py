"""Ranks that are threads of one process and tell each other through its memory, without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from pyint8.streaming.ranks.ranks import Ranks


class Wire:
    """What the groups of all ranks share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=30)
        self.gathered = 0

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class LocalGroup:
    """Stands for `pyint8.streaming.ranks.group.Group`.

    Args:
        wire: All ranks'.
        rank: This one's number.
        settle: Called before memory is read by the host: waits for the device.
    """

    batch_bytes = 100_000

    def __init__(self, wire: Wire, rank: int, settle: Callable[[], None] = lambda: None) -> None:
        self._wire = wire
        self._settle = settle
        self.size, self.rank, self.stream = wire.size, rank, 0
        self.device: torch.device | None = torch.device("cpu")

    def check_device(self, device: torch.device) -> None:
        """Every device is as good as any."""

    def settle(self) -> None:
        """Everything is done at once."""

    def leave(self) -> None:
        """There is nothing to let go of."""

    @contextmanager
    def used(self) -> Iterator[None]:
        yield

    def tell(self, mine: Sequence[int]) -> Callable[[], list[list[int]]]:
        said = [list(row) for row in self._wire.exchange(self.rank, tuple(mine))]
        return lambda: said

    def messages(self, mine: bytes, lengths: Sequence[int]) -> list[bytes]:
        assert len(mine) == lengths[self.rank]
        found: list[bytes] = self._wire.exchange(self.rank, mine)
        return found

    def gather(self, pieces: Sequence[tuple[torch.Tensor, int]]) -> None:
        self._settle()
        for memory, part in pieces:
            mine = self.part_of(memory, part).clone()
            for rank, theirs in enumerate(self._wire.exchange(self.rank, mine)):
                memory[rank * part : (rank + 1) * part] = theirs
            self._wire.gathered += part

    def part_of(self, memory: torch.Tensor, part: int) -> torch.Tensor:
        return memory[self.rank * part : (self.rank + 1) * part]


def on_ranks(size: int, work: Callable[[Ranks, int], Any], settle: Callable[[], None] = lambda: None) -> list[Any]:
    """What `work` returns or raises on each rank, called with its `Ranks` (entered) and its number."""
    wire = Wire(size)

    def one(rank: int) -> Any:
        try:
            with Ranks(LocalGroup(wire, rank, settle)) as ranks:  # type: ignore[arg-type]
                return work(ranks, rank)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
