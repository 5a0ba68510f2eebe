"""In which order ranks serve what they load together, and what of it lands as a whole: pure, and alike on all of them.

To gather a band takes a few turns of the interpreter's lock, and to gather hundreds of megabytes takes as many. While
results are few, their memory has room for tensors as they are stored: so these land whole, as those of a head start do,
and only the last pass through scratch in bands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pyint8.streaming.ranks.pieces import part_of
from pyint8.streaming.requests import ToInt8

if TYPE_CHECKING:
    from pyint8.streaming.requests import TensorRequest

# So many bytes are read while one that is early is served: what the bus moves in the time that Python takes for it.
_BESIDE_EARLY = 0.4
# Tensors land whole while so much is free beside the results: what is read, gathered and quantized at a time.
_WHOLE_BYTES = 768 << 20


def between_early(requests: Sequence[TensorRequest], early: Collection[str]) -> list[TensorRequest]:
    """With some of what is to be read between what is early, which has landed by now: the bus would stand still until
    all of it is served. What is early stays in order, and so do others."""
    others = deque(request for request in requests if request.entry.name not in early)
    found: list[TensorRequest] = []
    due = 0.0
    for request in requests:
        if request.entry.name in early:
            found.append(request)
            due += request.entry.nbytes * _BESIDE_EARLY
        while others and due > 0:
            found.append(others.popleft())
            due -= found[-1].entry.nbytes
    return [*found, *others]


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
        if request.part is None or request.part.name not in wholes:
            budget -= request.allocated_bytes
        if request.part is not None:
            wholes.add(request.part.name)
        if request.entry.name in early or part_of(request.entry.nbytes, ranks) == 0:
            continue
        if budget < _WHOLE_BYTES or request.entry.nbytes > _WHOLE_BYTES or not isinstance(request.becomes, ToInt8):
            break
        found.add(request.entry.name)
    return found
