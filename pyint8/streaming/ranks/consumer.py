"""A GPU's consumer whose bands all ranks gather: to those who ask it for tensors it is like any other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyint8.errors import CancelledError
from pyint8.streaming.scratch import SHARED_PARTS, shared_band_bytes

if TYPE_CHECKING:
    import torch

    from pyint8.streaming.extension import _core
    from pyint8.streaming.ranks.conductor import Conductor

# That may be on their way, with what one of them takes beyond its share. The consumer lists no more than has room, if a
# batch takes no more than this leaves to it (csrc/core/quantize/consumer.cpp).
_BATCHES = 2


class SharedConsumer:
    """Has the methods of `_core.Consumer`, and is what the conductor takes bands from.

    Args:
        consumer: Reads this rank's parts of bands, and makes tensors of them once they are gathered.
        conductor: Gathers them.
        scratch: The consumer's, uint8.
    """

    def __init__(self, consumer: _core.Consumer, conductor: Conductor, scratch: torch.Tensor) -> None:
        self._consumer = consumer
        self._conductor = conductor
        self.scratch = scratch
        self.batch_bytes = (SHARED_PARTS - 1) * shared_band_bytes(scratch.numel()) // _BATCHES

    # --- as a consumer -----------------------------------------------------------------------------------------------

    def submit(self, requests: list[_core.RequestTuple], stream: int, *, first: bool) -> int:
        """As the consumer's."""
        ticket = self._consumer.submit(requests, stream, first=first)
        self._conductor.notify()
        return ticket

    def wait(self, ticket: int, stream: int) -> int:
        """As the consumer's.

        Raises:
            RankError: Another rank failed.
            Pyint8Error: The gathering met an error.
        """
        try:
            return self._consumer.wait(ticket, stream)
        except CancelledError:
            self._conductor.check()
            raise

    def done(self) -> int:
        """As the consumer's."""
        return self._consumer.done()

    # --- as a source, for the conductor ------------------------------------------------------------------------------

    def has_more(self) -> bool:
        return bool(self._consumer.sizes_ahead(0, 1))

    def sizes_ahead(self, skipped: int, most: int) -> list[int]:
        return self._consumer.sizes_ahead(skipped, most)

    def await_parts(self, count: int, stream: int, milliseconds: int) -> list[tuple[torch.Tensor, int]] | None:
        found = self._consumer.await_parts(count, stream, milliseconds)
        if found is None:
            return None
        start = self.scratch.data_ptr()
        return [(self.scratch[at - start : at - start + nbytes], part) for at, nbytes, part in found]

    def gathered(self, count: int, stream: int) -> None:
        self._consumer.gathered(count, stream)
