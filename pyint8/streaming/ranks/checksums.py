"""Checksums of tensors of which each rank reads a part: compared once all has been read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import reduce
from operator import xor
from typing import TYPE_CHECKING

from pyint8.errors import from_core

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.streaming.extension import _core


class SharedChecksums:
    """Of one load. All ranks add the same, in whatever order.

    Args:
        engine: What reads, and sums up.
    """

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._added: list[tuple[Entry, int]] = []

    def __bool__(self) -> bool:
        return bool(self._added)

    def add(self, entry: Entry, file: int) -> int:
        """The engine's number for reads of an entry's bytes, and of the engine's file, that all ranks make."""
        self._added.append((entry, self._engine.add_shared_checksum(file, entry.offset, entry.nbytes)))
        return self._added[-1][1]

    def forget(self, numbers: Collection[int]) -> None:
        """Those of what not all ranks will read."""
        self._added = [added for added in self._added if added[1] not in numbers]

    def of_parts(self) -> list[tuple[int, int]]:
        """(CRC-32C, bytes) of what this rank alone read of each, for `compare`."""
        return [self._engine.sums_of(number)[1] for _, number in self._in_order()]

    def compare(self, of_ranks: Sequence[Sequence[Sequence[int]]]) -> None:
        """Compares all that has been read wholly.

        Args:
            of_ranks: What `of_parts` gave each rank.

        Raises:
            ChecksumError: Of the first whose bytes are not those that were saved.
        """
        for (entry, number), of_parts in zip(self._in_order(), zip(*of_ranks, strict=True), strict=True):
            sums = [self._engine.sums_of(number)[0], *of_parts]
            found = reduce(xor, (value for value, _ in sums))
            if found != entry.crc32c and sum(nbytes for _, nbytes in sums) == entry.nbytes:
                problem = f"its bytes have the CRC-32C {found:08x}, and had {entry.crc32c:08x}"
                raise from_core("damaged", problem, entry.path, entry.offset, 0)

    def _in_order(self) -> Iterator[tuple[Entry, int]]:
        yield from sorted(self._added, key=lambda added: added[0].name)
