"""What of the tensors that ranks load together lands as a whole: pure, and alike on all of them.

To gather a band takes a few turns of the interpreter's lock, and to gather hundreds of megabytes takes as many. While
results are few, their memory has room for tensors as they are stored: so these land whole, as those of a head start do,
and only the last pass through scratch in bands.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pyint8.streaming.made import memory_for
from pyint8.streaming.ranks.pieces import part_of
from pyint8.streaming.requests import ToInt8

if TYPE_CHECKING:
    from pyint8.streaming.requests import TensorRequest

# Tensors land whole while so much is free beside the results: what is read, gathered and quantized at a time.
_WHOLE_BYTES = 768 << 20


def whole_ones(requests: Sequence[TensorRequest], early: Collection[str], budget: int, ranks: int) -> set[str]:
    """The names of those that land whole.

    All of them are before the first of which bands are gathered: what lands whole is gathered ahead of any band.

    Args:
        requests: In the order in which they are served.
        early: What is on its way already.
        budget: Of bytes of results, and of what they are made of.
        ranks: How many there are.
    """
    found: set[str] = set()
    wholes: set[str] = set()  # of which requests are parts
    for request in requests:
        budget -= memory_for(request, wholes)
        if request.entry.name in early or part_of(request.entry.nbytes, ranks) == 0:
            continue
        if budget < _WHOLE_BYTES or request.entry.nbytes > _WHOLE_BYTES or not isinstance(request.becomes, ToInt8):
            break
        found.add(request.entry.name)
    return found
