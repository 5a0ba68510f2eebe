"""In which order ranks serve what they load together, and what of it lands as a whole: pure, and alike on all of them.

To gather a band takes a few turns of the interpreter's lock, and to gather hundreds of megabytes takes as many. While
results are few, their memory has room for tensors as they are stored: so these land whole, as those of a head start do,
and only the last pass through scratch in bands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from pyint8.streaming.made import memory_for
from pyint8.streaming.ranks.pieces import part_of
from pyint8.streaming.requests import ToInt8

if TYPE_CHECKING:
    from pyint8.streaming.requests import TensorRequest

# So many bytes are read while one that is early is served: what the bus moves in the time that Python takes for it.
_BESIDE_EARLY = 0.4
# Tensors land whole while so much is free beside the results: what is read, gathered and quantized at a time.
_WHOLE_BYTES = 768 << 20


def between_early(requests: Sequence[TensorRequest], early: Collection[str], budget: int) -> list[TensorRequest]:
    """With some of what is to be read between what is early, which has landed by now: the bus would stand still until
    all of it is served. What is early stays in order, and so do others.

    None is served where it has no room beside what is early still, as stored too, or takes that of what comes next.
    """
    others = deque(request for request in requests if request.entry.name not in early)
    mine = [request for request in requests if request.entry.name in early]
    wholes: set[str] = set()
    left = budget - sum(request.entry.nbytes for request in mine)
    found: list[TensorRequest] = []
    due = 0.0
    for request, needed in zip(mine, _needed_behind(mine), strict=True):
        found.append(request)
        left += request.entry.nbytes - memory_for(request, wholes)
        due += request.entry.nbytes * _BESIDE_EARLY
        while others and due > 0:
            other = others[0]
            if other.allocated_bytes + max(other.entry.nbytes, needed) > left:
                break
            left -= memory_for(other, wholes)
            due -= other.entry.nbytes
            found.append(others.popleft())
    return [*found, *others]


def _needed_behind(early: Sequence[TensorRequest]) -> list[int]:
    """For each the room that those behind it need, beside all of them: each leaves its own once it is served."""
    wholes: set[str] = set()
    taken = [memory_for(request, wholes) for request in early]
    needed = [0]
    for request, nbytes in zip(reversed(early), reversed(taken), strict=True):
        needed.append(nbytes + max(0, needed[-1] - request.entry.nbytes))
    return needed[-2::-1]


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
