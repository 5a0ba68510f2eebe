"""CRC-32C of tensors, taken while their bytes pass by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from pyint8.streaming.extension import _core


class Checksums:
    """Of tensors that are written, by several threads at once.

    Args:
        known: Those of tensors that are written already.

    Attributes:
        of: By tensor, the CRC-32C of its bytes.
    """

    def __init__(self, known: Mapping[str, int] | None = None) -> None:
        self.of: dict[str, int] = dict(known or {})

    def noting(self, name: str, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """The pieces of a tensor's bytes; once the last has gone by, its checksum is known."""
        checksum = 0
        for piece in pieces:
            checksum = _core.crc32c(piece, checksum)
            yield piece
        self.of[name] = checksum
